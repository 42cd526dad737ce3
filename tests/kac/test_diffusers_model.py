"""Models of diffusers as velocity networks: the change of variables, and the samples."""

import copy
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from kac import noise
from kac.guidance import guide
from kac.networks import build_network
from kac.networks.diffusers_model import DiffusersModelConfig
from kac.networks.network_kinds import outline_network
from kac.networks.schedule import read_schedule
from kac.networks.velocity import NetworkModule
from kac.path import GaussianPath
from kac.solvers import knot_times, solve
from kac.util.errors import CheckpointError
from tests.kac.diffusers_folders import SHAPE, config_of, ddim, dit, sample, unet

CLASSES = 3
LABEL = torch.tensor([0, 2])
NOISE = noise.noise(GaussianPath(), 5, range(2), SHAPE)
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def network_of(model: nn.Module, scheduler: Any, labels: str = "none", **options: Any) -> NetworkModule:
    config = DiffusersModelConfig(model=config_of(model), scheduler=config_of(scheduler), labels=labels, **options)  # type: ignore[arg-type]
    network = build_network(config, SHAPE, CLASSES)
    network.get_submodule(str(network.diffusers_name)).load_state_dict(model.state_dict())
    return network.eval()


def velocity(network: NetworkModule, x: Tensor, t: Tensor) -> Tensor:
    with torch.inference_mode():
        return network(x, t, LABEL)


def integrate(network: NetworkModule, x: Tensor, start: float = 1.0, steps: int = 200) -> Tensor:
    return solve(lambda x, t: velocity(network, x, t), x, knot_times(steps) * start, "heun").x


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_velocity_is_eps_minus_x_0_at_every_trained_level(schedule: str, prediction: str):
    scheduler = diffusers.DDPMScheduler(beta_schedule=schedule, prediction_type=prediction, clip_sample=False)
    model = unet()
    network, sampler = network_of(model, scheduler), ddim(scheduler)
    for timestep in (0, 1, 250, 700, 950):
        z = NOISE + 0.3
        alpha = scheduler.alphas_cumprod[timestep].double().sqrt()
        sigma = (1 - alpha**2).sqrt()
        with torch.inference_mode():
            output = model(z, torch.tensor(timestep)).sample
        x_0 = sampler.step(output, timestep, z).pred_original_sample.double()
        u = (z - alpha * x_0) / sigma - x_0
        found = velocity(network, (z / (alpha + sigma)).float(), (sigma / (alpha + sigma)).float())
        assert torch.allclose(found.double(), u, rtol=2e-3, atol=2e-3 * u.abs().max().item())


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_the_velocity_of_edm_is_eps_minus_x_0(kind: str, prediction: str):
    scheduler = getattr(diffusers, kind)(prediction_type=prediction)
    model = unet()
    for sigma in (0.002, 0.3, 7.0, 80.0):
        z = sigma * NOISE
        scaled, timestep = scheduler.precondition_inputs(z, sigma), scheduler.precondition_noise(sigma)
        with torch.inference_mode():
            x_0 = scheduler.precondition_outputs(z, model(scaled, timestep).sample, torch.tensor(sigma))
        u = (z - x_0) / sigma - x_0
        found = velocity(network_of(model, scheduler), z / (1 + sigma), torch.tensor(sigma / (1 + sigma)))
        assert torch.allclose(found, u, rtol=1e-3, atol=1e-3 * u.abs().max().item())


def test_a_flow_model_is_called_with_its_own_times():
    model, t = unet(), torch.tensor(0.3)
    with torch.inference_mode():
        u = model(NOISE, 1000 * t).sample
    assert torch.allclose(velocity(network_of(model, diffusers.FlowMatchEulerDiscreteScheduler()), NOISE, t), u)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_heun_generates_the_samples_of_ddim(schedule: str, prediction: str):
    scheduler = diffusers.DDPMScheduler(200, beta_schedule=schedule, prediction_type=prediction, clip_sample=False)
    model = unet(roughness=0.02)
    network, sampler = network_of(model, scheduler), ddim(scheduler)
    first, x, z, start = 0, NOISE, NOISE, 1.0
    if prediction == "epsilon":  # near t = 1, an untrained eps is divided by almost 0, so no two solvers agree
        alphas = sampler.alphas_cumprod.double()
        alpha, sigma = alphas.sqrt(), (1 - alphas).sqrt()
        level = int((sigma / (alpha + sigma) < 0.9).sum()) - 1
        first, start = len(alphas) - 1 - level, (sigma / (alpha + sigma))[level].item()
        z = ((alpha + sigma)[level] * NOISE).float()
    ours, theirs = integrate(network, x, start, steps=100), sample(model, sampler, z, first)
    error = (ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()
    print(f"{schedule} {prediction}: relative error {error:.1e}")
    assert error < 0.03


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.EDMEulerScheduler(),
        diffusers.EDMEulerScheduler(prediction_type="v_prediction"),
        diffusers.EDMDPMSolverMultistepScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
)
def test_heun_generates_the_samples_of_the_models_own_sampler(scheduler: Any):
    model = unet()
    scheduler.set_timesteps(200)
    start = getattr(scheduler, "init_noise_sigma", 1.0)
    ours = integrate(network_of(model, scheduler), NOISE, steps=100)
    theirs = sample(model, scheduler, start * NOISE)
    error = (ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()
    print(f"{type(scheduler).__name__}: relative error {error:.1e}")
    assert error < 0.02


def test_above_the_last_trained_time_noise_moves_to_the_start_of_the_samplers():
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    network = network_of(unet(), scheduler)
    signal = scheduler.alphas_cumprod[-1].double()
    alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
    last = (sigma / (alpha + sigma)).item()
    x = solve(lambda x, t: velocity(network, x, t), NOISE, torch.tensor([1.0, last + 1e-6]).double(), "euler").x
    assert torch.allclose(x, (NOISE / (alpha + sigma)).float(), atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_student_learns_at_every_time_and_takes_conditions(prediction: str):
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction)
    teacher = network_of(unet(classes=CLASSES + 1), scheduler, "with_null")
    config = DiffusersModelConfig(
        model=config_of(unet(classes=CLASSES + 1)), scheduler=config_of(scheduler), labels="with_null"
    ).for_student(("end_time", "guidance"), bounded=False)
    student = build_network(config, SHAPE, CLASSES)
    student.load_state_dict({**student.state_dict(), **teacher.state_dict()})
    conditions = {"end_time": torch.tensor(0.0), "guidance": torch.tensor([0.0, 1.0])}
    for t in (1.0, 0.5, 0.02):
        student.zero_grad()
        u = student(NOISE, torch.tensor(t), LABEL, **conditions)
        u.square().mean().backward()
        assert u.isfinite().all()
        assert all(bool(p.grad.abs().sum() > 0) for n, p in student.named_parameters() if n.startswith("unet.conv_out"))
        assert sum(p.grad.abs().sum() for n, p in student.named_parameters() if n.startswith("conditions.")) > 0
    assert torch.allclose(
        student.eval()(NOISE, torch.tensor(0.5), LABEL, **conditions),
        velocity(teacher, NOISE, torch.tensor(0.5)),
        atol=1e-6,
    )
    copy.deepcopy(student)  # no graph is left behind


def test_a_student_does_not_amplify_its_output_at_the_noise():
    scheduler, model = diffusers.DDPMScheduler(), unet()
    networks = [network_of(model, scheduler, student=is_student) for is_student in (False, True)]
    t = torch.tensor(networks[0].t_range[1])  # type: ignore[arg-type]
    teachers, students = (velocity(network, NOISE, t) for network in networks)
    assert torch.allclose(students, teachers * (1 - t) / 0.05, atol=1e-4)
    assert teachers.abs().mean() > 50
    assert students.abs().mean() < 25


def test_a_transformer_is_guided_by_its_null_label_and_its_variance_is_dropped():
    model, scheduler = dit(CLASSES), diffusers.DDPMScheduler()
    network = network_of(model, scheduler, "with_null")
    t = torch.tensor(0.4)
    null = torch.full_like(LABEL, CLASSES)
    with torch.inference_mode():
        u, without = network(NOISE, t, LABEL), network(NOISE, t, null)
        guided = guide(network, 1.5, LABEL)(NOISE, t)
    assert u.shape == NOISE.shape and not torch.allclose(u, without)
    assert torch.allclose(guided, 2.5 * u - 1.5 * without, atol=1e-4)


def test_the_outline_has_no_values():
    config = DiffusersModelConfig(
        model=config_of(unet()), scheduler=config_of(diffusers.DDPMScheduler()), labels="none"
    )
    assert {parameter.device.type for parameter in outline_network(config, SHAPE, CLASSES).parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("scheduler", "named"),
    [
        (diffusers.CMStochasticIterativeScheduler(), "CMStochasticIterativeScheduler"),
        (diffusers.DDPMScheduler(thresholding=True), "thresholding"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
        (diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"), "continuous"),
    ],
)
def test_a_scheduler_that_is_not_supported_is_named(scheduler: Any, named: str):
    with pytest.raises(CheckpointError, match=named):
        read_schedule(config_of(scheduler))
