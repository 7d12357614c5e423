"""Make tests/fixtures/samplers.json: chains of diffusers' schedulers on twelve numbers, with a formula in the UNet's place.

    pip install torch diffusers
    python tools/make_samplers.py tests/fixtures/samplers.json

x_t, noises   the start of every chain before `init_noise_sigma`, and the noise that step i adds
cases         scheduler config, sampler kind, karras, steps; then diffusers' timesteps, what the model is given at each step
              (`scale_model_input`), and the end of the chain

The model is 0.7 tanh(x) + 0.3 sin(t / 150), of the scaled input, in float64. Schedulers compute in float32, as in a pipeline.
"""
import json, sys
import torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler

SD = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
KINDS = {"euler": EulerDiscreteScheduler, "euler-ancestral": EulerAncestralDiscreteScheduler, "dpmpp-2m": DPMSolverMultistepScheduler}
# kind, karras (absent: the config's), steps, more of the config
CASES = [(kind, None, steps, dict(timestep_spacing=spacing)) for kind in KINDS for spacing, steps in [("leading", 7), ("linspace", 6), ("trailing", 5)]]
CASES += [(kind, None, 20, {}) for kind in KINDS]  # no spacing: the class's own
CASES += [(kind, True, steps, dict(timestep_spacing=spacing)) for kind in ["euler", "dpmpp-2m"] for spacing, steps in [("leading", 8), ("linspace", 20)]]
CASES += [(kind, None, 16, dict(timestep_spacing="leading", use_karras_sigmas=True)) for kind in ["euler", "dpmpp-2m"]]
CASES += [(kind, None, 6, dict(timestep_spacing="leading", prediction_type="v_prediction")) for kind in KINDS]
CASES += [(kind, None, 5, dict(timestep_spacing="trailing", prediction_type="v_prediction", rescale_betas_zero_snr=True)) for kind in KINDS]
CASES += [(kind, None, 6, dict(prediction_type="sample", final_sigmas_type="sigma_min")) for kind in ["euler", "dpmpp-2m"]]
CASES += [(kind, None, 20, dict(beta_schedule="squaredcos_cap_v2", beta_start=0.0001, beta_end=0.02, use_karras_sigmas=True)) for kind in ["dpmpp-2m"]]
CASES += [(kind, None, 1, dict(timestep_spacing="leading")) for kind in KINDS]


def chain(kind, config, karras, steps, x_t, noises):
    extra = dict(use_karras_sigmas=karras) if karras else {}
    scheduler = KINDS[kind](**{**config, **extra})
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)  # two Karras levels may have one timestep
    x, inputs = x_t * scheduler.init_noise_sigma, []
    for i, t in enumerate(scheduler.timesteps):
        given = scheduler.scale_model_input(x, t)
        inputs.append(given)
        out = (0.7 * torch.tanh(given.double()) + 0.3 * torch.sin(t.double() / 150)).float()
        if kind == "euler-ancestral":
            import diffusers.schedulers.scheduling_euler_ancestral_discrete as module
            module.randn_tensor = lambda *_, **__: noises[i]
        x = scheduler.step(out, t, x).prev_sample
    return dict(config=config, kind=kind, karras=karras, steps=steps, timesteps=scheduler.timesteps.double().tolist(),
                inputs=[given.tolist() for given in inputs], latents=x.tolist())


def main(path):
    torch.manual_seed(0)
    x_t, noises = torch.randn(12), torch.randn(20, 12)
    cases = [chain(kind, {**SD, **more}, karras, steps, x_t, noises) for kind, karras, steps, more in CASES]
    short = lambda o: [short(e) for e in o] if isinstance(o, list) else {k: short(v) for k, v in o.items()} if isinstance(o, dict) else float(f"{o:.8g}") if isinstance(o, float) else o
    with open(path, "w") as f:
        json.dump(short(dict(x_t=x_t.tolist(), noises=noises.tolist(), cases=cases)), f, separators=(",", ":"))
        f.write("\n")


main(sys.argv[1])
