"""Write tiny stand-ins for CLIP, T5, DINOv2 and Stable Video Diffusion, in the format of the Hugging Face hub.

The code that loads the published models loads them too, so scale=tiny runs the same code as scale=full. As in full, the
tapped feature grid of SVD and the patch grid of DINOv2 have the same number of tokens (8 x 8 here, 16 x 16 in full).

Text encoders and UNet have random weights. The VAE has to reconstruct pictures, and the stand-in of DINOv2 has to
represent what is where. Their weights, tiny_vae.safetensors and tiny_dinov2.safetensors, were fitted by the second
command to videos of the play table's scenes A, B and C, without actions; scene D, in which policies are tested, was not
used.

Examples:
    python -m common.standins
    python -m common.standins frames=[data/playtable/A/videos_set,data/playtable/B/videos_set] out=outputs/standins
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from omegaconf import DictConfig
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models import save_for_hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from common.contracts import TrainableModel
from common.errors import MissingFileError
from common.frozen import IMAGENET_MEAN, IMAGENET_STD
from common.loop import Loop
from common.program import program
from common.progress import tqdm
from common.video import read_frames, resize

log = logging.getLogger(__name__)
# Words with a token of their own. All others are spelled in bytes, so that any sentence can be encoded.
WORDS = """take grasp store place put slide push pull press move lift pick go turn use rotate stack collapse open close
 sweep toggle the a an of from in into on onto off up down to left right front back side top bottom under with and
 then it red blue pink green yellow block object cube table drawer cabinet sliding door slider handle button switch
 lever light bulb lightbulb led lamp degrees clockwise grasped lying what is inside cup pot pan bowl spoon towel sink
 rack apple bottle hand""".split()
FITTED = Path(__file__).with_name("tiny_vae.safetensors")
FITTED_DINOV2 = Path(__file__).with_name("tiny_dinov2.safetensors")
WIDTH = 64
IMAGE = 64
DINOV2 = {"img_size": IMAGE, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "num_classes": 0}


def make_all(
    out: str | Path, *, seed: int = 0, vae: AutoencoderKLTemporalDecoder | None = None, dinov2: nn.Module | None = None
) -> Path:
    """Write svd/, clip/, t5/ and dinov2/ under `out` and return it. Each is complete or absent."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    makers = {
        "svd": lambda folder: _svd(folder, vae),
        "clip": _clip,
        "t5": _t5,
        "dinov2": lambda folder: _dinov2(folder, dinov2),
    }
    for number, (name, make) in enumerate(makers.items()):
        tmp_dir = out / f".{name}.{os.getpid()}"
        shutil.rmtree(tmp_dir, ignore_errors=True)
        tmp_dir.mkdir()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed * 100 + number)
            make(tmp_dir)
        shutil.rmtree(out / name, ignore_errors=True)
        os.replace(tmp_dir, out / name)
    return out


def _clip(folder: Path) -> None:
    tokenizer = _tokenizer(bos="<|startoftext|>", eos="<|endoftext|>", pad="<|endoftext|>")
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(getattr(tokenizer, f"{name}_token"))
        for name in ("bos", "eos", "pad")
    }
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        **ids,
    )
    model = CLIPTextModelWithProjection(config)
    _spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _t5(folder: Path) -> None:
    tokenizer = _tokenizer(eos="</s>", pad="<pad>")
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=WIDTH // 2,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    T5EncoderModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _dinov2(folder: Path, model: nn.Module | None) -> None:
    save_for_hf(model or load_tiny_dinov2(), str(folder), model_args=DINOV2, safe_serialization=True)


def _svd(folder: Path, vae: AutoencoderKLTemporalDecoder | None) -> None:
    unet = UNetSpatioTemporalConditionModel(
        sample_size=8,
        in_channels=24,
        out_channels=12,
        block_out_channels=(32, 64, 64),
        num_attention_heads=(1, 2, 2),
        layers_per_block=1,
        cross_attention_dim=2 * WIDTH,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        num_frames=4,
        down_block_types=(
            "CrossAttnDownBlockSpatioTemporal",
            "CrossAttnDownBlockSpatioTemporal",
            "DownBlockSpatioTemporal",
        ),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )
    image_encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            projection_dim=2 * WIDTH,
            num_hidden_layers=1,
            num_attention_heads=1,
            image_size=32,
            patch_size=16,
        )
    )
    scheduler = EulerDiscreteScheduler(  # SVD's published schedule
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        interpolation_type="linear",
        prediction_type="v_prediction",
        sigma_min=0.002,
        sigma_max=700.0,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    pipeline = StableVideoDiffusionPipeline(
        vae=vae or load_tiny_vae(),
        image_encoder=image_encoder,
        unet=unet,
        scheduler=scheduler,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
    )
    pipeline.save_pretrained(folder)


def build_tiny_vae() -> AutoencoderKLTemporalDecoder:
    """SVD's VAE, small, with random weights: factor 8 as the original, but 12 channels instead of 4.

    An 8 x 8 latent of 4 channels would lose a block of 4 cm. The decoder ignores neighbouring frames, and fitting does
    not change that: it is fitted on single pictures and then decodes whole clips.
    """
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=12,
        sample_size=IMAGE,
        scaling_factor=0.18215,
    )
    with torch.no_grad():
        for name, weight in vae.decoder.named_parameters():
            if name.endswith("mix_factor"):
                weight.fill_(-20.0)  # weight 2e-9 for the branch that mixes frames, and no gradient
            elif name == "time_conv_out.weight":
                weight[:, :, [0, 2]] = 0  # the frames before and after; a single frame gives them no gradient
    return vae


def load_tiny_vae() -> AutoencoderKLTemporalDecoder:
    """The tiny VAE with the weights of this repository."""
    vae = build_tiny_vae()
    with safe_open(FITTED, framework="pt") as file:
        vae.load_state_dict({key: file.get_tensor(key).float() for key in list(file.keys())})
        vae.register_to_config(scaling_factor=float(file.metadata()["scaling_factor"]))
    return vae


def build_tiny_dinov2() -> nn.Module:
    """DINOv2's architecture, small, with random weights: 64 patches of 8 x 8 pixels, width 64, two layers.

    timm initialises the layer scales to 1e-5, which suits deep models and long training; here they are 1.
    """
    model = timm.create_model("vit_base_patch14_reg4_dinov2", pretrained=False, **DINOV2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("gamma"):
                weight.fill_(1.0)
    return model


def load_tiny_dinov2() -> nn.Module:
    """The stand-in of DINOv2 with the weights of this repository."""
    model = build_tiny_dinov2()
    with safe_open(FITTED_DINOV2, framework="pt") as file:
        model.load_state_dict({key: file.get_tensor(key).float() for key in list(file.keys())})
    return model


def _spread(model: CLIPTextModelWithProjection) -> None:
    """Increase CLIP's initial token embeddings from std 0.02 to 0.5.

    After a random transformer, sentences would otherwise barely differ; after a trained one they do.
    """
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "token_embedding" in name:
                weight.normal_(std=0.5)


def _tokenizer(*, eos: str, pad: str, bos: str | None = None) -> PreTrainedTokenizerFast:
    special = [token for token in dict.fromkeys((pad, eos, bos)) if token]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=special, initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    tokenizer.train_from_iterator(sorted(WORDS), trainer)
    template = " ".join(token for token in (bos, "$A", eos) if token)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(t, tokenizer.token_to_id(t)) for t in (bos, eos) if t]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, unk_token=None
    )


class Frames:
    """Random square crops of random frames of video sets.

    A VAE is convolutional, so small crops suffice, and training on them is four times faster.
    """

    def __init__(self, roots: Sequence[str | Path], crop: int, limit: int = 6000) -> None:
        rng, picked = np.random.default_rng(0), []
        for root in roots:
            files = sorted((Path(root) / "videos").rglob("*.mp4"))
            if not files:
                raise MissingFileError(
                    f"{root}: no videos/**/*.mp4 to fit the VAE to; record some with scripts/playtable_record.sh"
                )
            picked += [files[i] for i in rng.permutation(len(files))[: limit // 10]]
        self.images = torch.cat(
            [(resize(f[:: max(1, len(f) // 10)], IMAGE) * 255).byte() for f in map(read_frames, picked)]
        )
        self.crop = crop

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        top, left = rng.integers(0, IMAGE - self.crop + 1, 2)
        return {
            "id": f"frame/{index}",
            "image": self.images[index, :, top : top + self.crop, left : left + self.crop].float() / 127.5 - 1,
        }


class VAELoss(TrainableModel):
    """A VAE's training objective: reconstruction and a weak KL term towards a unit Gaussian.

    A block covers 20 of 4096 pixels, and a policy must see it, so saturated pixels have a larger weight.
    """

    def __init__(self, vae: AutoencoderKLTemporalDecoder, kl_weight: float = 1e-5, colour_weight: float = 6.0) -> None:
        super().__init__()
        self.vae, self.kl_weight, self.colour_weight = vae, kl_weight, colour_weight

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        posterior = self.vae.encode(batch["image"]).latent_dist
        decoded = self.vae.decode(posterior.sample(), num_frames=1).sample
        image, kl = batch["image"], posterior.kl().mean()
        weight = 1 + self.colour_weight * (image.amax(1, keepdim=True) - image.amin(1, keepdim=True))
        error = (decoded - image).abs() + 2 * (decoded - image).square()
        return {
            "loss": (weight * error).mean() + self.kl_weight * kl,
            "mse": (decoded - image).square().mean(),
            "kl": kl,
        }


class PatchLatentTargets:
    """A sample set of pictures and, for each of their patches, the VAE's latents of that patch and its 8 neighbours."""

    def __init__(self, images: Tensor, vae: AutoencoderKLTemporalDecoder) -> None:
        self.images = images
        with torch.no_grad():
            latents = torch.cat(
                [
                    vae.encode(chunk.float() / 127.5 - 1).latent_dist.mode()
                    for chunk in tqdm(images.split(32), desc="latents")
                ]
            )
        self.latents = latents * vae.config.scaling_factor  # (N, 12, 8, 8)

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        around = F.unfold(F.pad(self.latents[index, None], (1, 1, 1, 1), mode="replicate"), 3)[0].T  # (64, 108)
        return {"id": f"frame/{index}", "image": self.images[index].float() / 255, "target": around}


class PatchLatentRegression(TrainableModel):
    """The objective of the visual encoder: a linear layer predicts from each token what PatchLatentTargets gives.

    A token of 64 numbers then represents its patch and the surroundings, as DINOv2's tokens do. Neither actions nor
    sentences are used.
    """

    def __init__(self, model: nn.Module, target_dim: int) -> None:
        super().__init__()
        self.model, self.read = model, nn.Linear(WIDTH, target_dim)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Pictures (B, 3, 64, 64) in [0, 1] and targets (B, 64, 108) -> the mean squared error."""
        mean, std = (torch.tensor(c).view(3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD))
        tokens = self.model.forward_features((batch["image"] - mean) / std)[:, self.model.num_prefix_tokens :]
        return {"loss": F.mse_loss(self.read(tokens), batch["target"])}


def fit_dinov2(
    frames: Sequence[str | Path], vae: AutoencoderKLTemporalDecoder, output_dir: Path, *, steps: int, seed: int = 0
) -> nn.Module:
    """Train a visual encoder from scratch to predict the VAE's latents of video sets."""
    torch.manual_seed(seed)
    samples = PatchLatentTargets(Frames(frames, crop=IMAGE).images, vae)
    loop = Loop(
        output_dir=str(output_dir),
        seed=seed,
        max_steps=steps,
        batch_size=32,
        schedule="cosine",
        warmup_steps=100,
        log_every=50,
        save_every=1000,
        optimizer={"lr": 2e-3, "weight_decay": 1e-2},
        wandb={"mode": "disabled"},
    )
    return loop.fit(PatchLatentRegression(build_tiny_dinov2(), samples.latents.shape[1] * 9), samples).model


def fit_vae(
    frames: Sequence[str | Path], output_dir: Path, *, steps: int, seed: int = 0
) -> AutoencoderKLTemporalDecoder:
    """Train a VAE from scratch on video sets, and set its scaling factor so that scaled latents have unit variance."""
    torch.manual_seed(seed)
    samples = Frames(frames, crop=32)
    loop = Loop(
        output_dir=str(output_dir),
        seed=seed,
        max_steps=steps,
        batch_size=8,
        schedule="cosine",
        warmup_steps=50,
        log_every=50,
        save_every=500,
        optimizer={"lr": 1.5e-3, "weight_decay": 0.0, "betas": (0.9, 0.99)},
        wandb={"mode": "disabled"},
    )
    vae = loop.fit(VAELoss(build_tiny_vae()), samples).vae
    with torch.no_grad():
        latents = torch.cat(
            [vae.encode(chunk.float() / 127.5 - 1).latent_dist.mode() for chunk in samples.images[::8].split(32)]
        )
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    return vae


def _save_half(model: nn.Module, file: Path, metadata: dict[str, str]) -> None:
    save_file({key: value.half().contiguous() for key, value in model.state_dict().items()}, file, metadata=metadata)


@program("standins")
def main(cfg: DictConfig) -> None:
    out = Path(cfg.out)
    if not cfg.frames:
        make_all(out, seed=cfg.seed)
    else:
        vae = fit_vae(cfg.frames, out / "vae_run", steps=cfg.vae_steps, seed=cfg.seed)
        dinov2 = fit_dinov2(cfg.frames, vae, out / "dinov2_run", steps=cfg.dinov2_steps, seed=cfg.seed)
        make_all(out, seed=cfg.seed, vae=vae, dinov2=dinov2)
        _save_half(vae, out / FITTED.name, {"scaling_factor": str(vae.config.scaling_factor)})
        _save_half(dinov2, out / FITTED_DINOV2.name, {})
    log.info("stand-ins in %s", out)


if __name__ == "__main__":
    main()
