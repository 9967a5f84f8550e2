"""Batches that do not fit are halved, and what was asked of the forward pass is recorded: with a real extraction, and an error as torch raises it."""

import pytest
import torch

from kdstore.errors import ConfigError, ModelError
from kdstore.extract import job, run
from kdstore.extract.config import ExtractConfig
from kdstore.jsonfile import read_json
from kdstore.models.encode import encode_image, encode_image_tokens
from kdstore.models.load import load_model
from kdstore.models.memory import Fitting
from kdstore.store import open_store

GPU = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12")


def config(out, **changes):
    return ExtractConfig(**{"teacher": "scenes-T", "untrained_seed": 0, "data": "scenes/val:20", "out": str(out), "batch": 16, "device": "cpu", **changes})


def short_of_memory(module, limit, error, seen):
    """Make the module's forward pass fail as it does when memory runs out: for more than `limit` samples."""

    def check(_module, inputs):
        seen.append(len(inputs[0]))
        if len(inputs[0]) > limit:
            raise error

    return module.register_forward_pre_hook(check)


@pytest.mark.parametrize("error", [GPU, CPU], ids=["gpu", "cpu"])
def test_a_batch_that_does_not_fit_is_halved_for_good_and_gives_the_same(error):
    model, seen, said = load_model("scenes-T", untrained=True, device="cpu"), [], []
    image = torch.rand(10, 3, *model.image_size)
    whole = encode_image_tokens(model, image)
    short_of_memory(model.clip.visual.layer1, 3, error, seen)
    fitting = Fitting(said.append)
    for _ in range(2):
        for a, b in zip(whole, fitting.run("image", lambda part: encode_image_tokens(model, part), image), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    assert seen == [10, 5, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    assert said == ["Out of memory with 10 images at once; going on with 5.", "Out of memory with 5 images at once; going on with 2."]
    assert fitting.sizes == {"image": 2}


def test_one_image_that_does_not_fit_and_other_errors_are_not_swallowed():
    model = load_model("scenes-T", untrained=True, device="cpu")
    image = torch.rand(4, 3, *model.image_size)
    for limit, error in ((0, GPU), (3, RuntimeError("shapes cannot be multiplied"))):
        hook = short_of_memory(model.clip.visual, limit, error, [])
        with pytest.raises(type(error), match=str(error)[:20]):
            Fitting(lambda _: None).run("image", lambda part: (encode_image(model, part),), image)
        hook.remove()


def test_an_extraction_goes_on_with_half_the_batch_says_so_and_records_it(tmp_path, monkeypatch):
    run.extract(config(tmp_path / "whole", tokens="image"))
    seen, said, load = [], [], job.load_model

    def loaded(*args, **options):
        model = load(*args, **options)
        short_of_memory(model.clip.visual.layer1, 8, GPU, seen)
        return model

    monkeypatch.setattr(job, "load_model", loaded)
    result = run.extract(config(tmp_path / "half", tokens="image"), on_progress=lambda *report: said.append(report))
    assert "Out of memory with 16 images at once; going on with 8." in result.notices
    assert ("notice", 0, 0, "Out of memory with 16 images at once; going on with 8.") in said
    assert max(seen) == 16
    assert seen.count(16) == 1
    assert read_json(tmp_path / "half" / "run.json")["batch_after_out_of_memory"] == {"image": 8}
    assert read_json(tmp_path / "whole" / "run.json")["batch_after_out_of_memory"] == {}
    stores = [open_store(tmp_path / name) for name in ("whole", "half")]
    assert stores[0].identity == stores[1].identity
    a, b = (store.gather("image/tokens", range(20)) for store in stores)
    assert abs(a.astype("f4") - b.astype("f4")).max() < 2e-2


def test_the_layer_of_tokens_is_identity_and_how_the_pass_is_run_is_not(tmp_path):
    run.extract(config(tmp_path / "last", tokens="both", precision="bf16", channels_last=True))
    last, told = open_store(tmp_path / "last"), read_json(tmp_path / "last" / "run.json")
    assert last.identity["arrays"]["image/tokens"].items() >= {"layer": 4, "layers": 5, "final": "none", "prefix_stripped": 0, "precision": "bf16"}.items()
    assert last.identity["arrays"]["text/tokens"].items() >= {"final": "ln_final", "pad_id": 0}.items()
    assert told["channels_last"] is True
    assert told["compile"] is False
    run.extract(config(tmp_path / "early", tokens="both", token_layer="-2"))
    early = open_store(tmp_path / "early")
    assert early.identity["arrays"]["image/tokens"]["layer"] == 3
    assert early.arrays["image/tokens"].shape[2:] != last.arrays["image/tokens"].shape[2:]


def test_layers_that_cannot_be_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="penultimate"):
        config(tmp_path / "s", token_layer="penultimate")
    with pytest.raises(ModelError, match="5 layers"):
        run.extract(config(tmp_path / "s", tokens="image", token_layer="5"))
    assert not (tmp_path / "s").exists()
