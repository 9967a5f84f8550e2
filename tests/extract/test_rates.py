"""The share of a device's peak counts what the model did, attention too, and nothing that workers did elsewhere."""

import pytest

from kdstore.extract.config import ExtractConfig
from kdstore.extract.rates import flops_of, rates_of
from kdstore.extract.units import Tally
from kdstore.models.cost import cost_of
from kdstore.models.load import load_model


def test_operations_of_a_loaded_model_are_those_of_its_architecture_with_attention():
    cost, model = cost_of("scenes-L"), load_model("scenes-L", untrained=True, device="cpu")
    assert flops_of(model, 3, 2) == pytest.approx(2e9 * (3 * cost.image_gmacs + 2 * cost.text_gmacs))
    assert cost_of("ViT-B-32").image_gmacs == pytest.approx(4.41, abs=0.01)


def test_what_workers_did_has_no_share_of_the_peak_here():
    model, done = load_model("scenes-T", untrained=True, device="cpu"), Tally(images=8, encoded=8, model=1.0)
    here, elsewhere = (rates_of(ExtractConfig(teacher="scenes-T", workers=workers), model, done, Tally(), 1.0) for workers in (0, 2))
    assert here.share_of_peak > 0
    assert elsewhere.share_of_peak is None
