"""The four bottlenecks: gradients, losses, and unused codes that restart equally on all ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from common.metrics import code_counts, perplexity
from step2_gidm.quantizer import Binning, Continuous, GaussianMixture, VectorQuantizer

MAKERS = {
    "vq": lambda: VectorQuantizer(12, 5),
    "delayed": lambda: VectorQuantizer(12, 5, delay=2),
    "mixture": lambda: GaussianMixture(12, 5),
    "binning": lambda: Binning(5, 3),
    "continuous": lambda: Continuous(5),
}


@pytest.mark.parametrize("name", MAKERS)
def test_protocol(name: str) -> None:
    quantizer = MAKERS[name]()
    z = torch.randn(7, 4, quantizer.dim, requires_grad=True)
    out = quantizer(z)
    assert out.quantized.shape == z.shape and out.loss.shape == ()
    assert (out.codes is None) == (quantizer.size is None)
    if out.codes is not None:
        assert out.codes.shape == (7, 4) and out.codes.min() >= 0 and out.codes.max() < quantizer.size
        together, alone = (quantizer.eval()(part).codes for part in (z, z[:, [2]]))
        assert torch.equal(alone[:, 0], together[:, 2]), "a token's code depends on its neighbours"
    assert set(out.stats) == {"codebook", "commitment"}
    (out.quantized.sum() + out.loss).backward()
    assert torch.isfinite(z.grad).all() and (z.grad != 0).all()
    assert isinstance(quantizer.on_step_end(1), dict)


@pytest.mark.parametrize("name", MAKERS)
def test_no_step_waits_for_the_device(name: str) -> None:
    with FakeTensorMode():  # tensors without values: code that reads a value, or a shape that depends on one, fails
        quantizer = MAKERS[name]().train()
        out = quantizer(torch.randn(7, 4, quantizer.dim, requires_grad=True))
        (out.loss + out.quantized.sum()).backward()
        assert quantizer.on_step_end(1) == {}


def test_vq_takes_the_nearest_code_and_passes_gradients_straight_through() -> None:
    quantizer = VectorQuantizer(16, 4)
    torch.nn.init.normal_(quantizer.codebook)
    z = torch.randn(5, 3, 4, requires_grad=True)
    out = quantizer(z)
    brute = (z[:, :, None] - quantizer.codebook).square().sum(-1).argmin(-1)
    assert torch.equal(out.codes, brute)
    assert torch.allclose(out.quantized, quantizer.codebook[brute], atol=1e-6)
    upstream = torch.randn_like(z)
    (gradient,) = torch.autograd.grad(out.quantized, z, upstream, retain_graph=True)
    assert torch.equal(gradient, upstream)
    assert torch.autograd.grad(out.quantized.sum(), quantizer.codebook, allow_unused=True)[0] is None


def test_vq_loss_moves_the_codebook_towards_the_encoder_four_times_as_hard_as_back() -> None:
    quantizer = VectorQuantizer(4, 3, beta=0.25)
    z = torch.full((1, 1, 3), 2.0, requires_grad=True)
    out = quantizer(z)
    out.loss.backward()
    code = quantizer.codebook.detach()[out.codes[0, 0]]
    pull = quantizer.codebook.grad[out.codes[0, 0]]
    assert torch.allclose(pull, 2 / 3 * (code - 2.0)) and (pull < 0).all()
    assert torch.allclose(z.grad[0, 0], -0.25 * pull)
    assert out.loss.item() == pytest.approx(1.25 * (code - 2.0).square().mean().item(), rel=1e-5)
    assert (quantizer.codebook.grad.abs().sum(1) > 0).sum() == 1


def test_dead_codes_restart_on_the_schedule_onto_the_batch() -> None:
    quantizer = VectorQuantizer(8, 4, restart_every=3).train()
    z = torch.randn(16, 2, 4) + 10
    used = quantizer(z).codes.unique()
    before = quantizer.codebook.detach().clone()
    assert quantizer.on_step_end(1) == {} and quantizer.on_step_end(2) == {}
    quantizer(z)
    assert quantizer.on_step_end(3) == {"restarted": float(8 - len(used))}
    after = quantizer.codebook.detach()
    assert torch.equal(after[used], before[used])
    fresh = torch.ones(8, dtype=torch.bool)
    fresh[used] = False
    assert torch.cdist(after[fresh], z.flatten(0, 1)).min(1).values.max() < 0.2
    assert len(quantizer(z).codes.unique()) > len(used)


def test_no_restart_in_eval_or_after_the_end() -> None:
    quantizer = VectorQuantizer(8, 4, restart_every=1, restart_until=5).train()
    quantizer(torch.randn(4, 2, 4) + 10)
    assert quantizer.on_step_end(6) == {}
    quantizer.eval()(torch.randn(4, 2, 4))
    assert quantizer.on_step_end(1) == {}


@pytest.mark.parametrize("kind", [VectorQuantizer, GaussianMixture])
def test_usage_survives_a_resume(kind: type) -> None:
    one, two = (kind(8, 4, restart_every=4).train() for _ in range(2))
    two.load_state_dict(one.state_dict())
    early, late = torch.randn(4, 2, 4) + 3, torch.randn(4, 2, 4) - 3
    one(early)
    one.on_step_end(1)
    two.load_state_dict(one.state_dict())
    for quantizer in (one, two):
        quantizer(late)
        assert quantizer.on_step_end(4)["restarted"] > 0
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


RESTART = """
import importlib.util, sys, torch, torch.distributed as dist
rank, file, folder, kind, table = int(sys.argv[1]), *sys.argv[2:]
spec = importlib.util.spec_from_file_location("quantizer", file)  # without the package, which imports much more
module = importlib.util.module_from_spec(spec)
sys.modules["quantizer"] = module
spec.loader.exec_module(module)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
quantizer = getattr(module, kind)(6, 3, restart_every=2).train()
places = getattr(quantizer, table)
with torch.no_grad():
    places.copy_(torch.cat([torch.eye(3), -torch.eye(3)]) * 5)
torch.manual_seed(rank)
seen = places.detach()[[rank, rank + 1]]  # each rank uses two codes, one of them shared
for step in (1, 2):
    quantizer(seen[None] + 0.01 * torch.randn(4, 2, 3))
    report = quantizer.on_step_end(step)
torch.save({"state": quantizer.state_dict(), "report": report}, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind, table", [("VectorQuantizer", "codebook"), ("GaussianMixture", "means")])
def test_restart_is_equal_on_all_ranks(kind: str, table: str, tmp_path: Path) -> None:
    file = sys.modules[VectorQuantizer.__module__].__file__
    ranks = [
        subprocess.Popen([sys.executable, "-c", RESTART, str(rank), file, str(tmp_path), kind, table])
        for rank in (0, 1)
    ]
    assert [process.wait(120) for process in ranks] == [0, 0]
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, value in one["state"].items():
        assert torch.equal(value, two["state"][name]), name
    assert one["report"] == two["report"] == {"restarted": 3.0}, "a code that another rank uses is not dead"


def test_mixture_learns_where_the_data_is() -> None:
    torch.manual_seed(0)
    quantizer = GaussianMixture(
        12, 2, restart_every=100
    )  # more components than clusters: likelihood has poor local optima at equal numbers
    centres = torch.tensor([[3.0, 3.0], [-3.0, 3.0], [3.0, -3.0], [-3.0, -3.0]])
    z = (centres.repeat(64, 1) + 0.2 * torch.randn(256, 2))[:, None]
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.05)
    for step in range(300):
        optimizer.zero_grad()
        quantizer(z).loss.backward()
        optimizer.step()
        quantizer.on_step_end(step + 1)
    out = quantizer(z)
    assert (out.quantized - z).norm(dim=-1).mean() < 0.5
    assert perplexity(code_counts(out.codes, 12)) > 3.5


def test_mixture_at_the_papers_size_leaves_no_cluster_without_a_component() -> None:
    """In 128 dimensions a component far from the data gets no responsibility and no gradient."""
    torch.manual_seed(0)
    quantizer, centres = GaussianMixture(128, 128).train(), 0.3 * torch.randn(64, 128)
    optimizer = torch.optim.Adam(quantizer.parameters(), 1e-3)
    for step in range(200):
        z = (centres[torch.randint(64, (64,))] + 0.03 * torch.randn(64, 128))[:, None]
        optimizer.zero_grad()
        quantizer(z).loss.backward()
        optimizer.step()
        quantizer.on_step_end(step + 1)
    z = (centres.repeat(4, 1) + 0.03 * torch.randn(256, 128))[:, None]
    out = quantizer.eval()(z)
    assert len(out.codes.unique()) >= 48
    assert (out.quantized - z).square().mean() < 0.1 * z.square().mean()


def test_restarted_components_take_the_batchs_spread() -> None:
    quantizer = GaussianMixture(8, 4, restart_every=1).train()
    z = 0.2 * torch.randn(64, 2, 4) + 3
    used = quantizer(z).codes.unique()
    assert quantizer.on_step_end(1) == {"restarted": float(8 - len(used))} and len(used) < 8
    fresh = torch.ones(8, dtype=torch.bool)
    fresh[used] = False
    spread = z.flatten(0, 1).std(0, correction=0)
    assert (
        torch.allclose(quantizer.log_scales[fresh].exp(), spread.expand(int(fresh.sum()), -1))
        and (quantizer.log_scales[used] == 0).all()
    )


def test_mixture_density_is_right() -> None:
    quantizer = GaussianMixture(3, 2)
    torch.nn.init.normal_(quantizer.means)
    torch.nn.init.normal_(quantizer.log_scales, std=0.3)
    z = torch.randn(5, 2)
    normal = torch.distributions.Normal(quantizer.means, quantizer.log_scales.exp())
    truth = normal.log_prob(z[:, None]).sum(-1) + quantizer.logits.log_softmax(0)
    difference = quantizer._log_joint(z) - truth
    assert torch.allclose(difference, difference[0, 0].expand_as(difference), atol=1e-5)


def test_binning_levels_and_joint_index() -> None:
    quantizer = Binning(5, 2).eval()
    z = 2**0.5 * torch.erfinv(torch.tensor([[[-0.79, 0.01], [0.99, -0.99]]]))
    out = quantizer(z)
    assert torch.allclose(out.quantized, torch.tensor([[[-0.8, 0.0], [0.8, -0.8]]]), atol=1e-6)
    assert out.codes.tolist() == [[0 + 5 * 2, 4 + 5 * 0]]
    with pytest.raises(ValueError, match="no joint index"):
        Binning(16, 128)


def test_bins_are_evenly_used_wherever_the_numbers_lie() -> None:
    torch.manual_seed(0)
    quantizer, narrow = (
        Binning(5, 3).train(),
        lambda: torch.tensor([0.5, -2.0, 0.0]) + torch.tensor([0.02, 3.0, 0.1]) * torch.randn(500, 4, 3),
    )
    assert perplexity(code_counts(quantizer(narrow()).codes, 125).sum(0)) > 110, "from the first step"
    assert perplexity(code_counts(quantizer.eval()(narrow()).codes, 125).sum(0)) > 110


def test_quantizer_computes_in_fp32_under_autocast() -> None:
    quantizer = VectorQuantizer(8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantizer(torch.randn(2, 3, 4).bfloat16())
    assert out.loss.dtype == out.quantized.dtype == torch.float32


@pytest.mark.parametrize("make", [VectorQuantizer, GaussianMixture])
def test_frozen_codes_neither_learn_nor_restart_and_still_draw_latents(make: type) -> None:
    quantizer = make(8, 4, restart_every=1).train()
    quantizer.freeze_codebook()
    before = {name: parameter.clone() for name, parameter in quantizer.named_parameters()}
    z = torch.randn(16, 2, 4, requires_grad=True)
    out = quantizer(z)
    out.loss.backward()
    assert z.grad.any() and not any(parameter.requires_grad for parameter in quantizer.parameters())
    assert quantizer.on_step_end(1) == {}
    assert all(torch.equal(parameter, before[name]) for name, parameter in quantizer.named_parameters())


def test_a_smaller_z_makes_no_smaller_loss_where_z_is_normalised() -> None:
    """Without normalization, a z ten times smaller has a smaller loss: so latent actions shrank in finetuning."""
    torch.manual_seed(0)
    z, codes = torch.randn(64, 2, 4), torch.randn(8, 4)
    for normalize_tokens in (2, 0):
        quantizer = VectorQuantizer(8, 4, normalize_tokens=normalize_tokens).train()
        quantizer.codebook.data = codes
        losses = [float(quantizer(scale * z).loss.detach()) for scale in (1.0, 0.1)]
        assert (abs(losses[1] / losses[0] - 1) < 1e-2) == bool(normalize_tokens), losses


def test_z_does_not_drift_where_it_is_normalised() -> None:
    """The gradient passes through the statistics, so no loss can decrease by moving the mean of z."""
    z = torch.nn.Parameter(torch.randn(64, 2, 4))
    quantizer = VectorQuantizer(8, 4, normalize_tokens=2, delay=1000).train()
    pull = torch.randn(2, 4)
    (quantizer(z).quantized * pull).sum().backward()
    assert z.grad.sum(0).abs().max() < 1e-4


def test_frozen_codes_keep_the_statistics_that_they_were_made_with() -> None:
    quantizer = VectorQuantizer(8, 4, normalize_tokens=2).train()
    quantizer(torch.randn(64, 2, 4))
    quantizer.freeze_codebook()
    quantizer.train()
    before = quantizer.norm.running_var.clone()
    z = torch.randn(1, 2, 4) * 100
    assert torch.equal(quantizer(z).codes, quantizer.eval()(z).codes)
    assert torch.equal(quantizer.norm.running_var, before)


def test_queries_are_normalised_each_by_itself() -> None:
    """An offset common to all samples of a query carries no action, so it must not decide which code is nearest."""
    torch.manual_seed(0)
    z, offset = torch.randn(64, 2, 4), torch.tensor([50.0, -50.0]).view(1, 2, 1)
    plain, shifted = (VectorQuantizer(8, 4, normalize_tokens=2) for _ in range(2))
    shifted.load_state_dict(plain.state_dict())
    torch.testing.assert_close(plain.train()(z).quantized, shifted.train()(z + offset).quantized, rtol=1e-3, atol=1e-3)


def test_codes_are_delayed_in_training_alone_and_finetuning_does_not_start_over() -> None:
    quantizer = VectorQuantizer(12, 5, delay=2)
    z = torch.randn(7, 4, 5, requires_grad=True)
    for _ in range(2):
        out = quantizer(z)
        assert torch.equal(out.quantized, z), "the decoder reads z"
        assert torch.autograd.grad(out.loss, z, retain_graph=True)[0].abs().max() == 0, (
            "and nothing commits it to a code"
        )
        assert torch.autograd.grad(out.loss, quantizer.codebook)[0].abs().max() > 0, "while the codes learn where z is"
    other = VectorQuantizer(12, 5, delay=2)
    other.load_state_dict(quantizer.state_dict())
    fresh = VectorQuantizer(12, 5, delay=2)
    frozen = VectorQuantizer(12, 5, delay=2)
    frozen.freeze_codebook()
    for later in (quantizer, other, fresh.eval(), frozen):
        out = later(z)
        assert torch.allclose(out.quantized, later.codebook[out.codes], atol=1e-6)
        assert torch.autograd.grad(out.loss, z)[0].abs().max() > 0
