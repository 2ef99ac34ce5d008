"""Every scheduler of diffusers on data whose best denoiser and classifier are known in closed form.

T1: unguided samples have the distribution of the data; T2: with guidance scale 1, that of the class; T3: with any
scale, each equals the sample of classifier-free guidance with the exact conditional denoiser, from the same noise.
Both pipelines, the one with a classifier and the class-conditional one.
"""

import functools
import importlib

import pytest
import schedulers_table
import torch

import diffusers

from diffusers_ext.guidance import FLOW_SCHEDULERS, REFUSED_SCHEDULERS, UNKNOWN_PREDICTIONS
from diffusers_ext.pipelines import ClassConditionalPipeline


pytestmark = pytest.mark.filterwarnings("ignore")  # of numpy and torchsde about what diffusers does with them


@functools.cache
def bench():
    if not schedulers_table.BENCH.is_file():
        pytest.skip("needs ../shared/checks/schedulers_analytic.py")
    return schedulers_table.load_bench()


def cases():
    if not schedulers_table.BENCH.is_file():
        return []
    return [case for case in bench().cases() if not case.get("skip")]


def build(case):
    try:
        return bench().build(case, mixture=True)
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])


SAMPLERS = [
    pytest.param(schedulers_table.sample, id="classifier"),
    pytest.param(schedulers_table.sample_class_conditional, id="classifier-free"),
]


@pytest.mark.parametrize("sample", SAMPLERS)
@pytest.mark.parametrize("case", cases(), ids=lambda case: case["label"])
def test_guided_sample_equals_exact_guidance(case, sample):
    call = dict(num_inference_steps=12, guidance_scale=3.0, shape=(4, 3, 2, 2))
    scheduler, unet, classifier = build(case)
    run = functools.partial(sample, scheduler=scheduler, unet=unet, classifier=classifier, class_label=1, **call)
    if case["name"] in {*REFUSED_SCHEDULERS, *UNKNOWN_PREDICTIONS.get(case["pt"], ())}:
        with pytest.raises(ValueError, match=case["name"]):
            run()
        assert unet.calls == 0
        return
    torch.manual_seed(0)  # DPMSolverSDE and stochastic flow matching do not take the generator
    actual = run(generator=torch.Generator().manual_seed(0))
    scheduler, unet, _ = build(case)
    torch.manual_seed(0)
    expected = bench().reference_sampler(
        scheduler=scheduler, unet=unet, cfg_label=1, generator=torch.Generator().manual_seed(0), **call
    )
    assert actual.isfinite().all()
    assert (actual - expected).abs().max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("sample", SAMPLERS)
@pytest.mark.parametrize("case", cases(), ids=lambda case: case["label"])
def test_distributions_as_the_reference(case, sample):
    actual = bench().run_case(case, sample)
    expected = bench().run_case(case, bench().reference_sampler)
    if case["name"] in REFUSED_SCHEDULERS or "note" in expected:
        assert case["name"] in actual["note"]
    else:
        assert actual["d3"] < 1e-3
        assert set(expected["verdict"]) <= set(actual["verdict"])


@pytest.mark.parametrize("label", ["DDIMScheduler", "DDIMScheduler[v_prediction]", "FlowMatchHeunDiscreteScheduler"])
def test_guided_gaussians_stay_gaussian(label):
    """Between Gaussians of one width, guidance only moves the mean: to worse + s (wanted - worse), in closed form."""
    (case,) = [case for case in cases() if case["label"] == label] or [pytest.skip("needs the test bench")]
    scheduler, unet, _ = bench().build(case, mixture=False)
    means = torch.tensor([[0.3, 0.3, 0.3], [0.1, 0.2, -0.3]])
    guide_model = type(unet).from_config(unet.config, means=[means[1].tolist()])
    pipe = ClassConditionalPipeline(unet=unet, scheduler=scheduler, guide_model=guide_model)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        guidance_scale=2.0,
        num_inference_steps=250,
        batch_size=2048,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    expected = means[1] + 2.0 * (means[0] - means[1])
    torch.testing.assert_close(images.mean(dim=(0, 2, 3)), expected, rtol=0, atol=0.02)
    torch.testing.assert_close(images.std(dim=(0, 2, 3)), torch.full((3,), 0.25), rtol=0.05, atol=0)


def test_every_scheduler_of_diffusers_is_in_the_bench_or_refused():
    covered = set(REFUSED_SCHEDULERS) | {case["name"] for case in bench().cases()}
    names = {
        name
        for module in (diffusers, importlib.import_module("diffusers.schedulers.deprecated"))
        for name in dir(module)
        if name.endswith("Scheduler") and not name.startswith("Flax")
    }
    assert names - covered == set()
    assert set(FLOW_SCHEDULERS) <= names


def test_table_groups_by_network():
    rows = [
        {"name": "DDIMScheduler", "network": "vp", "d3": 1e-6},
        {"name": "DDIMScheduler", "network": "vp", "d3": 2e-6},
        {"name": "LCMScheduler", "network": "vp", "note": "refused"},
        {"name": "EDMEulerScheduler", "network": "edm", "d3": 3e-7},
    ]
    table = schedulers_table.markdown(rows)
    assert "| DDIM | 2 | 2e-06 |" in table
    assert "| EDMEuler | 1 | 3e-07 |" in table
    assert all(name.removesuffix("Scheduler") in table for name in REFUSED_SCHEDULERS)
