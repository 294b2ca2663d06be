"""Adam whose steps are not lost to rounding."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from learner.model.sharding import placed
from learner.model.worker_group import ALONE, WorkerGroup
from server.shared.model.merged import whole


class Adam:
    """torch's Adam over parameter groups. Each parameter below float32 is stepped through a float32 master copy: a
    bfloat16 weight would round most steps away.

    Of a sharded parameter, each of the `workers` steps its own shard, whose gradient is the sum over all already.
    Others are the same in every worker, and their gradients are added up here."""

    def __init__(
        self, groups: list[tuple[list[nn.Parameter], float]], epsilon: float, workers: WorkerGroup = ALONE
    ) -> None:
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        self.workers = workers
        masters = []
        for parameters, learning_rate in groups:
            copies = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float().clone()) for p in parameters]
            self._pairs += list(zip(parameters, copies, strict=True))
            masters.append({"params": copies, "lr": learning_rate})
        self._adam = torch.optim.Adam(masters, eps=epsilon)

    def set_learning_rate(self, group: int, learning_rate: float) -> None:
        """Sets it for the next steps of one group."""
        self._adam.param_groups[group]["lr"] = learning_rate

    def gather(self) -> None:
        """Adds the gradients of one micro-batch to the masters', so that they are summed in float32, too."""
        for parameter, master in self._pairs:
            if master is not parameter and parameter.grad is not None:
                gradient, parameter.grad = parameter.grad.float(), None
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    def step(self, max_grad_norm: float) -> float:
        """Clips by the global norm, steps and clears the gradients; returns the norm before the clip."""
        self.gather()
        norm = self._clip(max_grad_norm)
        if not torch.isfinite(norm):
            raise FloatingPointError("The gradient is not finite; the update was not made.")
        self._adam.step()
        self._adam.zero_grad()
        with torch.no_grad():
            for parameter, master in self._pairs:
                if master is not parameter:
                    parameter.copy_(master)
        return float(norm)

    def _clip(self, max_grad_norm: float) -> Tensor:
        """Clips the gradients by their global norm, which it returns."""
        masters = [master for _, master in self._pairs]
        sharded = [master for master in masters if isinstance(master, DTensor)]
        same = [master for master in masters if not isinstance(master, DTensor)]
        if self.workers.count > 1:
            for master in same:
                master.grad = torch.zeros_like(master) if master.grad is None else master.grad
                self.workers.add(master.grad)
        kinds = [kind for kind in (sharded, same) if kind]
        norms = [whole(get_total_norm([m.grad for m in kind if m.grad is not None])) for kind in kinds]
        norm = get_total_norm(norms)
        for kind in kinds:
            clip_grads_with_norm_(kind, max_grad_norm, norm)
        return norm

    def clear(self) -> None:
        """Drops gradients without a step."""
        for parameter, master in self._pairs:
            parameter.grad = master.grad = None

    def state(self) -> dict[str, Tensor]:
        """Master weights and moments by name, to be saved."""
        state = {f"{number}.weight": master.detach() for number, (_, master) in enumerate(self._pairs)}
        for number, (_, master) in enumerate(self._pairs):
            state.update({f"{number}.{name}": moment for name, moment in self._adam.state[master].items()})
        return state

    def blank_state(self) -> dict[str, Tensor]:
        """Tensors like those of `state` after a step, to be read into."""
        state: dict[str, Tensor] = {}
        for number, (_, master) in enumerate(self._pairs):
            blank = {name: torch.zeros_like(master.detach()) for name in ("weight", "exp_avg", "exp_avg_sq")}
            state.update({f"{number}.{name}": tensor for name, tensor in {**blank, "step": torch.tensor(0.0)}.items()})
        return state

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Restores what `state` returned; the parameters follow their masters. Raises KeyError for another model's."""
        moments: dict[int, dict[str, Tensor]] = {number: {} for number in range(len(self._pairs))}
        for name, value in state.items():
            of, _, kind = name.partition(".")
            master = self._pairs[int(of)][1]
            moments[int(of)][kind] = value if kind == "step" or isinstance(value, DTensor) else placed(value, master)
        for number, (parameter, master) in enumerate(self._pairs):
            master.copy_(moments[number].pop("weight"))
            parameter.copy_(master)
        # By way of torch, which moves each moment to its parameter's device.
        self._adam.load_state_dict({**self._adam.state_dict(), "state": moments})
