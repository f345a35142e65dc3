"""The networks of diffusers pipelines as `net(x, t, cond)` on our clock, one class a family."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from scoreaction.diffusion.processes import TableVP
from scoreaction.networks.conditions import map_conditions
from scoreaction.types import Conditions


class PipelineNet(nn.Module):
    """A pipeline's network `core` behind our interface: x and conditions go in at its precision, the output is x's.

    `null` (one row, set once the text is encoded) stands in where there are no prompts. Subclasses say how core is asked.
    """

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core
        self.null: Conditions = None

    def forward(self, x: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        whole = (p.dtype for name, p in self.core.named_parameters() if p.is_floating_point() and ".lora_" not in name)
        width = next(whole)  # the pretrained weights', but those that are quantised
        if self.null is not None and (cond is None or set(cond) == {"guidance"}):
            nobody = map_conditions(lambda n: n.to(x.device).expand(len(x), *n.shape[1:]), self.null)
            cond = {**nobody, **(cond or {})}
        conditions = (
            {} if cond is None else {key: value if key == "guidance" else value.to(width) for key, value in cond.items()}
        )
        return self.ask(x.to(width), t, conditions).to(x.dtype)

    def ask(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Core's prediction at x, in its own dtype."""
        raise NotImplementedError


class TableNet(PipelineNet):
    """A network whose time is an index into the table of its process."""

    def __init__(self, core: nn.Module, process: TableVP) -> None:
        super().__init__(core)
        self.process = process

    def timestep(self, t: Tensor) -> Tensor:
        """The index for t, (batch,) float32; exactly whole where t is a node up to the rounding of float32."""
        index = self.process.timestep(t.double())
        nearest = index.round()
        return torch.where((index - nearest).abs() < 1e-3, nearest, index).float()


class UNet(TableNet):
    """UNet2DModel of DDPM and DDIM pipelines: no conditions."""

    def ask(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.core(x, self.timestep(t), return_dict=False)[0]


class StableDiffusion(TableNet):
    """UNet2DConditionModel of Stable Diffusion 1 and 2: text (batch, 77, width)."""

    def ask(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.core(x, self.timestep(t), encoder_hidden_states=cond["text"], return_dict=False)[0]


class StableDiffusionXL(TableNet):
    """UNet2DConditionModel of Stable Diffusion XL: text (batch, 77, 2048), pooled (batch, 1280), and the picture's size.

    Its micro-conditioning is (height, width, 0, 0, height, width): an uncropped picture of the size that is drawn.
    """

    def __init__(self, core: nn.Module, process: TableVP, size: tuple[int, int]) -> None:
        super().__init__(core, process)
        self.size = size

    def ask(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        sizes = torch.tensor([[*self.size, 0, 0, *self.size]], dtype=x.dtype, device=x.device).expand(len(x), 6)
        return self.core(
            x,
            self.timestep(t),
            encoder_hidden_states=cond["text"],
            added_cond_kwargs={"text_embeds": cond["pooled"], "time_ids": sizes},
            return_dict=False,
        )[0]


class StableDiffusion3(PipelineNet):
    """SD3Transformer2DModel: text (batch, 333, 4096), pooled (batch, 2048)."""

    def ask(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.core(
            hidden_states=x,
            timestep=1000 * t,
            encoder_hidden_states=cond["text"],
            pooled_projections=cond["pooled"],
            return_dict=False,
        )[0]


class Flux(PipelineNet):
    """FluxTransformer2DModel: text (batch, 512, 4096), pooled (batch, 768), guidance (batch,) where it is distilled.

    x is (batch, 16, height/8, width/8); the transformer gets it in patches of 2 x 2, with the place of each.
    """

    def ask(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        batch, channels, height, width = x.shape
        rows, columns = height // 2, width // 2
        patches = x.view(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, -1)
        places = torch.zeros(rows, columns, 3, device=x.device, dtype=x.dtype)
        places[..., 1] = torch.arange(rows, device=x.device)[:, None]
        places[..., 2] = torch.arange(columns, device=x.device)[None]
        out = self.core(
            hidden_states=patches,
            timestep=t,
            guidance=cond.get("guidance"),
            encoder_hidden_states=cond["text"],
            pooled_projections=cond["pooled"],
            txt_ids=torch.zeros(cond["text"].shape[1], 3, device=x.device, dtype=x.dtype),
            img_ids=places.reshape(rows * columns, 3),
            return_dict=False,
        )[0]
        return out.view(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)


def side(value: Any) -> tuple[int, int]:
    """A sample_size of a configuration, one number or two, as (height, width)."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
