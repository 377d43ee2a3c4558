"""Frozen foundation models: CLIP and T5 text encoders, DINOv2, and the wrapper that keeps them frozen (Sec. 3.1-3.3).

A path is a local folder in the hub's own format or a hub id; `tiny` stand-ins are folders of the same kind.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

from common.errors import MissingFileError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class MissingWeights(MissingFileError):
    """Third-party weights are not where the config says."""


def resolve_weights_path(path: str | Path, what: str) -> str:
    """`path` if it is a folder or looks like a hub id. Else raises MissingWeights, which says how to fetch `what`."""
    path = str(path)
    if Path(path).is_dir():
        return path
    local = os.path.isabs(path) or path.startswith((".", "ckpts")) or path.count("/") != 1
    if local:
        hint = (
            f"python -m common.standins out={Path(path).parent}"
            if "tiny" in path
            else f"bash scripts/download_ckpts.sh {Path(path).name}"
        )
        raise MissingWeights(f"{what} not found in {path}; fetch it with: {hint}")
    return path


class FrozenModule(nn.Module):
    """Holds a module that must never train: no gradients, always in eval mode, absent from state_dict and parameters().

    The module is kept out of torch's registry, so that optimizers, DDP, FSDP and checkpoints never see it. `.to()`
    moves it.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.__dict__["module"] = module.eval().requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenModule:
        self.module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class TextEncoder(FrozenModule):
    """Encodes sentences and caches the results on the CPU, because instructions repeat.

    Each sentence is encoded alone: in a batch its last bits depend on the other sentences, even at equal length, and a
    resumed run must get the same numbers. The cache keeps at most `cache_bytes` (512 MiB are 14,000 sentences of twelve
    tokens from t5-base) and drops the least recently used sentence first.
    """

    cache_bytes = 512 * 2**20

    def __init__(self, module: nn.Module, tokenizer: Any) -> None:
        super().__init__(module)
        self.tokenizer = tokenizer
        self.cache: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()
        self.held = 0  # bytes in the cache

    def unknown(self, text: str) -> set[str]:
        """Characters without a token of their own, which the encoder therefore cannot tell apart."""
        unknown = self.tokenizer.unk_token_id
        return (
            {c for c in set(text) if unknown in self.tokenizer(c, add_special_tokens=False)["input_ids"]}
            if unknown is not None
            else set()
        )

    def _encode(self, texts: list[str]) -> list[tuple[Tensor, ...]]:
        raise NotImplementedError

    def _recall(self, texts: list[str]) -> list[tuple[Tensor, ...]]:
        rows = {text: self._row(text) for text in dict.fromkeys(texts)}
        return [rows[text] for text in texts]

    @torch.no_grad()
    def _row(self, text: str) -> tuple[Tensor, ...]:
        if text not in self.cache:
            with torch.autocast(self.device.type, enabled=False):  # the result must not depend on who asks first
                self.cache[text] = self._encode([text])[0]
            self.held += _bytes(self.cache[text])
        self.cache.move_to_end(text)
        row = self.cache[text]
        while self.held > self.cache_bytes:
            self.held -= _bytes(self.cache.popitem(last=False)[1])
        return row


def _bytes(row: tuple[Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in row)


def text_encoders(model: nn.Module) -> Iterator[TextEncoder]:
    """Every text encoder of a model, including those inside frozen parts."""
    for part in model.modules():
        if isinstance(part, TextEncoder):
            yield part
        elif isinstance(part, FrozenModule):
            yield from text_encoders(part.module)


def weights_sha256(module: nn.Module) -> str:
    """One hash, in hex, over name, dtype, shape and bytes of every parameter and buffer, frozen parts included.

    It tells apart what a path or a config does not, for example stand-ins that were fitted again in the same folder. A
    few GB take seconds.
    """
    digest = hashlib.sha256()
    for name, tensor in _tensors(module):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _tensors(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Name and value of every tensor in the order of the modules, also inside a FrozenModule, which torch skips."""
    yield from (
        (prefix + name, tensor) for part in (module.named_parameters(), module.named_buffers()) for name, tensor in part
    )
    for name, part in module.named_modules():
        if isinstance(part, FrozenModule):
            yield from _tensors(part.module, f"{prefix}{name}/")


class CLIPTextEncoder(TextEncoder):
    """CLIP's text encoder; sentences are padded or cut to `length` tokens (VPP uses 20)."""

    def __init__(self, module: CLIPTextModelWithProjection, tokenizer: Any, length: int) -> None:
        super().__init__(module, tokenizer)
        self.length = length
        self.dim = module.config.hidden_size
        self.pooled_dim = module.config.projection_dim

    def _encode(self, texts: list[str]) -> list[tuple[Tensor, Tensor]]:
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        out = self.module(**{k: tokens[k].to(self.device) for k in ("input_ids", "attention_mask")})
        return list(zip(out.last_hidden_state.float().cpu(), out.text_embeds.float().cpu()))

    def forward(self, texts: list[str]) -> Tensor:
        """B strings -> (B, length, dim) last hidden states after the final norm, BOS, EOT and padding included."""
        return torch.stack([tokens for tokens, _ in self._recall(texts)]).to(self.device)

    def pooled(self, texts: list[str]) -> Tensor:
        """B strings -> (B, pooled_dim) projected EOT feature, not normalised."""
        return torch.stack([pooled for _, pooled in self._recall(texts)]).to(self.device)


class T5TextEncoder(TextEncoder):
    """T5's encoder; sentences are padded to the longest one of the batch."""

    def __init__(self, module: T5EncoderModel, tokenizer: Any) -> None:
        super().__init__(module, tokenizer)
        self.dim = module.config.d_model

    def _encode(self, texts: list[str]) -> list[tuple[Tensor]]:
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
        mask = tokens["attention_mask"].bool()
        out = self.module(input_ids=tokens["input_ids"].to(self.device), attention_mask=mask.to(self.device))
        return [(hidden[keep].float().cpu(),) for hidden, keep in zip(out.last_hidden_state, mask)]

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """B strings -> tokens (B, L, dim), zero where padded, and mask (B, L), True for real tokens."""
        rows = [tokens for (tokens,) in self._recall(texts)]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(tokens.shape[1])[None] < lengths[:, None]
        return tokens.to(self.device), mask.to(self.device)


class DinoV2(FrozenModule):
    """DINOv2's patch tokens after the final norm, without class and register tokens."""

    def __init__(self, module: nn.Module, image_size: int) -> None:
        super().__init__(module)
        self.image_size, self.dim = image_size, module.num_features
        self.grid: tuple[int, int] = tuple(module.patch_embed.grid_size)
        self.num_tokens = self.grid[0] * self.grid[1]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], resized to the encoder's size -> (B, num_tokens, dim)."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = F.interpolate(
                images, (self.image_size, self.image_size), mode="bilinear", antialias=True, align_corners=False
            )
        mean, std = (
            torch.tensor(c, device=images.device, dtype=images.dtype).view(3, 1, 1)
            for c in (IMAGENET_MEAN, IMAGENET_STD)
        )
        tokens = self.module.forward_features(((images - mean) / std).to(self.dtype))
        return tokens[:, self.module.num_prefix_tokens :].float()


def clip_text(path: str | Path, max_length: int = 20) -> CLIPTextEncoder:
    """Load a CLIP text encoder (f_text in the paper; VPP and the release use openai/clip-vit-base-patch32)."""
    path = resolve_weights_path(path, "CLIP text encoder")
    return CLIPTextEncoder(
        CLIPTextModelWithProjection.from_pretrained(path), AutoTokenizer.from_pretrained(path), max_length
    )


def t5_text(path: str | Path) -> T5TextEncoder:
    """Load a T5 encoder (UniVLA and the release use t5-base)."""
    path = resolve_weights_path(path, "T5 text encoder")
    return T5TextEncoder(T5EncoderModel.from_pretrained(path), AutoTokenizer.from_pretrained(path))


def dinov2(path: str | Path, image_size: int = 224) -> DinoV2:
    """Load DINOv2 through timm, from a local folder in timm's hub format or from a hub id.

    The release uses timm/vit_base_patch14_reg4_dinov2.lvd142m.
    """
    path = resolve_weights_path(path, "DINOv2")
    source = f"local-dir:{path}" if Path(path).is_dir() else f"hf-hub:{path}"
    return DinoV2(timm.create_model(source, pretrained=True, num_classes=0, img_size=image_size), image_size)
