"""Drawing a box of 128^3 voxels by diffusion, with each sampler

One box, drawn whole, bf16, an untrained network: its speed does not depend on what it learned. The numbers
of steps are those with which the variance of Gaussian fields is within 2.6% of the true one, given the
exact denoiser ([Diffusion](diffusion.md#samplers)): at that quality samplers differ by their steps alone.
On a CPU the network is small (channels 8-16-32, no attention), with one thread, a few steps are drawn, and
the time of all is in proportion; it is that of the processor, for other work may run beside. On a GPU the
network is that of the CAMELS study (48-96-192-384) and all steps are drawn. "x" is how much longer the box
takes than with `dpm-solver++`.
"""

import time
from typing import Any

import torch

from galdist.models import build
from galdist.models.diffusion import DiffusionConfig, VariationalDiffusion
from galdist.models.samplers import Drawing, Sampler

GPU = torch.cuda.is_available()
N_MESH = 128
STEPS = {"dpm-solver++": 30, "ddim": 250, "ancestral": 500}
FEW = 5


def run() -> list[dict[str, Any]]:
    """The rows."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if GPU else "cpu")
    channels = (48, 96, 192, 384) if GPU else (8, 16, 32)
    model = build(DiffusionConfig(channels=channels, attention=int(GPU)))
    assert isinstance(model, VariationalDiffusion)
    matter = torch.poisson(torch.ones(1, 1, *(N_MESH,) * 3), generator=torch.Generator().manual_seed(1))
    model.prepare(lambda name: iter([matter[0].numpy()]))
    model.to(device).eval()
    batch = {"halo": 0, "periodic": True, "matter_counts": matter}
    clock = time.perf_counter if GPU else time.process_time

    def seconds(kind: Any, steps: int) -> float:
        """A step, from the difference of two draws, so that what a draw costs once does not count."""
        took = []
        for number in (1, 1 + steps):
            drawing = Drawing(sampler=Sampler(kind=kind, steps=number))
            began = clock()
            with torch.autocast(device.type, torch.bfloat16):
                model.sample(batch, torch.Generator().manual_seed(2), drawing)
            took.append(clock() - began)
        return (took[1] - took[0]) / steps

    seconds("ddim", 1)
    each = {kind: seconds(kind, number if GPU else FEW) for kind, number in STEPS.items()}
    least = each["dpm-solver++"] * STEPS["dpm-solver++"]
    return [
        {
            "sampler": f"`{kind}`",
            "steps": number,
            "a step [s]": each[kind],
            "a box [s]": each[kind] * number,
            "x": each[kind] * number / least,
        }
        for kind, number in STEPS.items()
    ]


if __name__ == "__main__":
    for row in run():
        print(row)
