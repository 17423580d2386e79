"""Authors' checkpoints into finished cells and back: nothing is lost on the way, nothing is overwritten by accident."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from helpers.official import CASES, Case, randomized
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lmd_bench.checkpoints.exchange import export_checkpoint, import_checkpoint
from lmd_bench.checkpoints.official import OfficialRequest
from lmd_bench.config import ImportedConfig
from lmd_bench.errors import BenchError, ConfigError, WeightsError
from lmd_bench.harness.weights import WEIGHTS_FILE, load_method_weights
from lmd_bench.method import Batch, Method, inputs_of
from lmd_bench.reconstruct.checkpoint import open_run
from lmd_bench.registry import load_method


def official_file(case: Case, path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint of the case's authors, saved as .pth or .safetensors."""
    tensors = randomized(case.build().to_official())
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"model": tensors, "epoch": 3}, path)
    return tensors


def request(case: Case, path: Path) -> OfficialRequest:
    return OfficialRequest(path, case.method, case.settings, case.projector)


@pytest.mark.parametrize("name", CASES)
def test_what_is_imported_is_a_method_to_use_and_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    case, path = CASES[name], tmp_path / "official.pth"
    tensors = official_file(case, path)
    opened = import_checkpoint(request(case, path), tmp_path / "cell")
    method, config = load_method_weights(tmp_path / "cell")
    assert isinstance(config, ImportedConfig)
    assert (config.method, config.image_size, config.source) == (case.method, case.image_size, "official.pth")
    assert config.source_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert same_step(method, opened.method)
    export_checkpoint(tmp_path / "cell", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        assert back[key].dtype == value.dtype, key
        assert torch.equal(back[key], value), key


def same_step(one: Method, other: Method) -> bool:
    """Whether two methods' training steps are the same bit for bit."""
    losses = []
    for method in (one, other):
        torch.manual_seed(5)
        images = torch.rand(2, 3, method.data.image_size, method.data.image_size)
        samples = [((image * 255).byte(), None) for image in images]
        batch = Batch(images, extra=method.collate(samples, torch.Generator().manual_seed(6)))
        losses.append(method.training_step(inputs_of(method, batch), step=1, total_steps=2).loss)
    return bool(torch.isfinite(losses[0])) and torch.equal(losses[0], losses[1])


@pytest.mark.parametrize("name", ["mae", "lmd", "ddim"])
def test_an_imported_cell_reconstructs(name: str, tmp_path: Path) -> None:
    official_file(CASES[name], tmp_path / "official.safetensors")
    import_checkpoint(request(CASES[name], tmp_path / "official.safetensors"), tmp_path / "cell")
    checkpoint = open_run(tmp_path / "cell", torch.device("cpu"))
    assert checkpoint.config is None
    size = checkpoint.image_size
    mask = torch.zeros(1, size // 16, size // 16, dtype=torch.bool)
    mask[..., 0] = size > 16
    filled = checkpoint.method.reconstruct(torch.rand(1, 3, size, size), mask)
    assert filled.shape == (1, 3, size, size)
    assert bool(((filled >= 0) & (filled <= 1)).all())


def test_an_imported_lmd_is_a_start_for_training(tmp_path: Path) -> None:
    case = CASES["lmd"]
    tensors = official_file(case, tmp_path / "official.pth")
    import_checkpoint(request(case, tmp_path / "official.pth"), tmp_path / "cell")
    method_class = load_method("lmd", {})
    options = {**case.options, "init_weights": str(tmp_path / "cell" / WEIGHTS_FILE)}
    method = method_class(method_class.Config.model_validate(options), case.build().data)
    assert all(torch.equal(value, tensors[key]) for key, value in method.to_official().items())


def test_what_lies_in_the_way_is_kept(tmp_path: Path) -> None:
    case, path, cell = CASES["mae"], tmp_path / "official.pth", tmp_path / "cell"
    official_file(case, path)
    import_checkpoint(request(case, path), cell)
    before = (cell / WEIGHTS_FILE).read_bytes()
    with pytest.raises(ConfigError, match=r"holds weights\.safetensors already; name another folder, or --force"):
        import_checkpoint(request(case, path), cell)
    (cell / "record.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds a run of its own \(record\.json\)"):
        import_checkpoint(request(case, path), cell, force=True)
    (cell / "record.json").unlink()
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        import_checkpoint(request(case, path), path)
    assert (cell / WEIGHTS_FILE).read_bytes() == before
    torch.save({"model": randomized(case.build().to_official(), seed=2)}, path)
    import_checkpoint(request(case, path), cell, force=True)
    assert (cell / WEIGHTS_FILE).read_bytes() != before


def test_exports_overwrite_nothing_by_accident(tmp_path: Path) -> None:
    case, path, cell, out = CASES["mae"], tmp_path / "official.pth", tmp_path / "cell", tmp_path / "back.safetensors"
    official_file(case, path)
    import_checkpoint(request(case, path), cell)
    with pytest.raises(ConfigError, match=r"written as \.safetensors"):
        export_checkpoint(cell, tmp_path / "back.pth")
    with pytest.raises(ConfigError, match="is the cell's own file of weights"):
        export_checkpoint(cell, cell / WEIGHTS_FILE, force=True)
    export_checkpoint(cell, out)
    first = out.read_bytes()
    with pytest.raises(ConfigError, match="exists already; name another file, or --force"):
        export_checkpoint(cell, out)
    out.write_bytes(b"")
    export_checkpoint(cell, out, force=True)
    assert out.read_bytes() == first
    with pytest.raises(WeightsError, match=r"no weights\.safetensors in this folder"):
        export_checkpoint(tmp_path, tmp_path / "other.safetensors")


def test_nothing_is_written_where_a_checkpoint_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "official.pth"
    official_file(CASES["ddim"], path)
    with pytest.raises(WeightsError):
        import_checkpoint(request(CASES["mae"], path), tmp_path / "cell")
    assert not (tmp_path / "cell").exists()


def test_a_method_that_its_options_do_not_describe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method_class = load_method("mae", {})
    whole = method_class.from_official.__func__  # type: ignore[attr-defined]

    def altered(cls: type[Method], tensors: dict[str, Tensor], **options: object) -> Method:
        method: Method = whole(cls, tensors, **options)
        method.extra = nn.Linear(2, 2)
        return method

    monkeypatch.setattr(method_class, "from_official", classmethod(altered))
    official_file(CASES["mae"], tmp_path / "official.pth")
    with pytest.raises(BenchError, match=r"MAE cannot be built again from its options: .*extra\.weight"):
        import_checkpoint(request(CASES["mae"], tmp_path / "official.pth"), tmp_path / "cell")
    assert not (tmp_path / "cell").exists()
