"""Training: it learns, its numbers are right, its checkpoint loads anywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kernels
from alexnet_triton import fuse, reference_lenet, training
from alexnet_triton.data import load_fashion_mnist, to_input
from alexnet_triton.models import init_xavier_uniform
from alexnet_triton.plot import plot_curves
from alexnet_triton.training import CheckpointError, EpochMetrics, evaluate, load_checkpoint, measure_speed, new_model

CPU = torch.device("cpu")


def _train(out: Path, seed: int = 0, epochs: int = 1, limit: int = 64, **options) -> tuple[nn.Module, list[EpochMetrics]]:
    data = load_fashion_mnist("sample")
    net = new_model("lenet", seed, CPU)
    arguments = {
        "model": "lenet",
        "epochs": epochs,
        "batch_size": 16,
        "lr": 0.9,
        "seed": seed,
        "device": CPU,
        "out": out,
    }
    with kernels.use_backend("torch"):
        history = training.train(net, data.train.limited(limit), data.test.limited(50), **(arguments | options))
    return net, history


def test_xavier_uniform_as_d2l() -> None:
    net = reference_lenet()
    net.apply(init_xavier_uniform)
    bound = (6 / (400 + 120)) ** 0.5
    weight = net[7].weight.detach()
    assert weight.abs().max() <= bound
    assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_one_epoch_is_the_plain_loop(tmp_path: Path) -> None:
    """Loss, accuracy and weights of an epoch against a loop written out."""
    net, (metrics,) = _train(tmp_path, seed=3)
    data = load_fashion_mnist("sample")
    train, test = data.train.limited(64), data.test.limited(50)
    torch.manual_seed(3)
    plain = reference_lenet().apply(init_xavier_uniform)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.9)
    loss_sum, right = 0.0, 0
    for index in torch.randperm(64, generator=torch.Generator().manual_seed(3)).split(16):
        logits = plain(to_input(train.images[index], 28))
        loss = F.cross_entropy(logits, train.labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(index)
        right += int((logits.argmax(1) == train.labels[index]).sum())
    assert metrics.loss == pytest.approx(loss_sum / 64, rel=1e-5)
    assert metrics.train_acc == pytest.approx(right / 64)
    with torch.no_grad():
        predicted = plain(to_input(test.images, 28)).argmax(1)
    assert metrics.test_acc == pytest.approx((predicted == test.labels).double().mean().item())
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_same_seed_same_run(tmp_path: Path) -> None:
    losses = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        losses.append(_train(tmp_path / name, seed=seed)[1][0].loss)
    assert losses[0] == losses[1] != losses[2]


def test_files_of_a_run(tmp_path: Path) -> None:
    net, history = _train(tmp_path, epochs=2)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]
    assert list(lines[0]) == ["epoch", "loss", "train_acc", "test_acc", "images_per_s", "seconds"]
    assert lines[1]["loss"] == history[1].loss
    assert lines[0]["images_per_s"] == pytest.approx(64 / lines[0]["seconds"])
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    plain = reference_lenet()
    plain.load_state_dict(content["state_dict"], strict=True)
    loaded, model, metrics = load_checkpoint(tmp_path / "checkpoint.pt", CPU)
    assert model == "lenet"
    assert metrics == lines
    x = torch.rand(3, 1, 28, 28)
    with torch.no_grad(), kernels.use_backend("torch"):
        assert torch.equal(loaded(x), net.eval()(x))
        torch.testing.assert_close(plain(x), net(x))
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "checkpoint.pt"}


def test_evaluate_counts_the_last_partial_batch(tmp_path: Path) -> None:
    net, _ = _train(tmp_path)
    test = load_fashion_mnist("sample").test.limited(50)
    with kernels.use_backend("torch"):
        whole = evaluate(net, test, batch_size=50, image_size=28, device=CPU)
        parts = evaluate(net, test, batch_size=7, image_size=28, device=CPU)
    assert parts == pytest.approx(whole, rel=1e-5)
    assert not net.training


def test_measuring_speed_leaves_no_trace() -> None:
    net = new_model("lenet", 0, CPU)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    with kernels.use_backend("torch"):
        assert measure_speed(net, load_fashion_mnist("sample").train, 16, 28, CPU) > 0
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        _train(tmp_path, lr=3e38)
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None], ids=["empty", "text", "missing"])
def test_what_is_no_checkpoint_is_refused_by_name(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pt: "):
        load_checkpoint(path, CPU)


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.pt"
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of alexnet-triton"):
        load_checkpoint(path, CPU)


@pytest.mark.parametrize("content", [{}, {"model": "vgg"}, {"model": "lenet"}, {"model": "lenet", "state_dict": {}}], ids=str)
def test_an_incomplete_checkpoint_is_refused(content: dict, tmp_path: Path) -> None:
    path = tmp_path / "part.pt"
    torch.save({"format": training.CHECKPOINT_FORMAT, **content}, path)
    with pytest.raises(CheckpointError, match=r"unknown model|do not fit lenet"):
        load_checkpoint(path, CPU)


def test_curves_are_a_picture(tmp_path: Path) -> None:
    history = [EpochMetrics(i, 2.0 / i, 0.1 * i, 0.1 * i, 100.0, 1.0) for i in (1, 2, 3)]
    plot_curves(history, tmp_path / "curves.png", "title")
    from matplotlib.image import imread

    picture = imread(tmp_path / "curves.png")
    assert picture.shape[:2] == (675, 1050)
    assert picture[..., :3].std() > 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_keeps_float32_masters(tmp_path: Path, dtype: torch.dtype) -> None:
    """It learns as float32 does, and the checkpoint holds the masters, not the rounded weights."""
    data = load_fashion_mnist("sample").train.limited(96)
    losses = {}
    for precision in (torch.float32, dtype):
        net = new_model("lenet", 0, CPU, precision)
        trainer = training.Trainer(net, data, batch_size=16, image_size=28, lr=0.5, device=CPU, graph=False)
        with kernels.use_backend("torch"):
            losses[precision] = [trainer.epoch(torch.Generator().manual_seed(0))[0] for _ in range(2)]
    assert losses[dtype] == pytest.approx(losses[torch.float32], rel=0.03)
    weights = trainer.float32_weights()
    assert all(value.dtype == torch.float32 for value in weights.values())
    rounded = net.state_dict()
    assert all(torch.equal(weights[key].to(dtype), rounded[key]) for key in weights)
    assert any(not torch.equal(weights[key], rounded[key].float()) for key in weights)
    training.save_checkpoint(tmp_path / "checkpoint.pt", weights, "lenet", [])
    loaded, *_ = load_checkpoint(tmp_path / "checkpoint.pt", CPU)
    assert all(torch.equal(value, weights[key]) for key, value in loaded.state_dict().items())


def test_a_graph_needs_cuda() -> None:
    data = load_fashion_mnist("sample").train.limited(16)
    with pytest.raises(ValueError, match="a CUDA graph needs a CUDA device, not cpu"):
        training.Trainer(new_model("lenet", 0, CPU), data, batch_size=8, image_size=28, lr=0.1, device=CPU, graph=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_captured_step_is_the_eager_step(dtype: torch.dtype) -> None:
    """The same bits after two epochs with a smaller last batch; the capture itself changes nothing."""
    cuda = torch.device("cuda")
    data = load_fashion_mnist("sample").train.limited(150)
    results = []
    for graph in (False, True):
        net = new_model("lenet", 0, cuda, dtype)
        trainer = training.Trainer(net, data, batch_size=64, image_size=28, lr=0.5, device=cuda, graph=graph)
        generator = torch.Generator(cuda).manual_seed(0)
        epochs = [trainer.epoch(generator)[:2] for _ in range(2)]
        results.append((epochs, trainer.float32_weights()))
    (eager, eager_weights), (captured, captured_weights) = results
    assert eager == captured
    assert all(torch.equal(value, captured_weights[key]) for key, value in eager_weights.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_dropout_draws_anew_in_each_replay() -> None:
    cuda = torch.device("cuda")
    net = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 10)).to(cuda)
    net = fuse(net)
    data = load_fashion_mnist("sample").train.limited(64)
    trainer = training.Trainer(net, data, batch_size=64, image_size=28, lr=0.0, device=cuda, graph=True)
    same_order = [trainer.epoch(torch.Generator(cuda).manual_seed(0))[0] for _ in range(3)]
    assert len(set(same_order)) == 3
