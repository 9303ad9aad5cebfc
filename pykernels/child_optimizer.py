"""What ChildTuning's optimizers share: options, masks by name, saved states, and the step over groups of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import _backend, child_state, child_update
from . import child_shards as shards
from ._checks import check_choice, check_float, name_of
from .random_bits import keep_threshold

MODES = ("F", "D", "none")
ORIGINAL_MODES = {"ChildTuning-F": "F", "ChildTuning-D": "D", None: "none"}
# Options of torch.optim that a saved state may hold, and that mean nothing here.
FOREIGN = ("foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay", "amsgrad")


def check_rate(name: str, value: object, least: float = 0.0) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(f"{name}: expected one floating number, got {name_of(value.dtype)} {list(value.shape)}")
        return
    check_float(name, value)
    if not (math.isfinite(value) and value >= least):  # type: ignore[arg-type, operator]
        raise ValueError(f"{name}: expected a finite number >= {least:g}, got {value}")


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_not_captured(params: Sequence[Any]) -> None:
    """A captured step would repeat its masks and its number, which is on the CPU, in every replay."""
    if any(p.is_cuda for p in params) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("step: expected to be called outside of a CUDA graph's capture: masks differ between steps")


class ChildTuning(Optimizer):
    """What ChildTuningAdamW and ChildTuningSGD share: masks, streams, state."""

    _step_supports_amp_scaling = True
    moments: tuple[str, ...] = ()
    backend: str | None = None
    dense_state_dict = False

    def __init__(
        self, params: Any, defaults: dict[str, Any], masks: Mapping[Any, Tensor] | None, backend: str | None
    ) -> None:
        self.backend = backend
        super().__init__(params, defaults)
        if masks is not None:
            self.set_masks(masks)

    # --- parameters and options ---

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch.optim. Every option of the constructor but masks and backend may differ between groups."""
        if isinstance(param_group, dict) and "params" in param_group:
            self._check_group({**self.defaults, **param_group})
        count = len(self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            group["mode"] = ORIGINAL_MODES.get(group["mode"], group["mode"])
            params = group["params"]
            if len({id(p) for p in params}) != len(params):
                raise ValueError("params: expected every parameter once, got one of them twice")
            for i, p in enumerate(params):
                if p.dtype not in _backend.FLOATS:
                    raise TypeError(f"params[{i}]: expected a floating dtype, got {name_of(p.dtype)}")
                if group["stochastic_rounding"] and p.dtype != torch.bfloat16:
                    raise TypeError(f"stochastic_rounding: expected bfloat16 parameters, got {name_of(p.dtype)}")
            if len({g["max_grad_norm"] for g in self.param_groups}) > 1:
                raise ValueError("max_grad_norm: expected the same in all groups: the norm is that of all gradients")
        except Exception:
            del self.param_groups[count:]
            raise

    def _check_group(self, group: Mapping[str, Any]) -> None:
        check_choice("mode", ORIGINAL_MODES.get(group["mode"], group["mode"]), MODES)
        check_float("reserve_p", group["reserve_p"])
        if not 0 < group["reserve_p"] <= 1:
            raise ValueError(f"reserve_p: expected 0 < reserve_p <= 1, got {group['reserve_p']}")
        keep_threshold(group["reserve_p"])
        if isinstance(group["seed"], bool) or not isinstance(group["seed"], int):
            raise TypeError(f"seed: expected an int, got {type(group['seed']).__name__}")
        if not -(2**63) <= group["seed"] < 2**64:
            raise ValueError(f"seed: expected 64 bits, got {group['seed']}")
        check_choice("where", group["where"], ("grad", "update"))
        check_choice("decay", group["decay"], ("all", "reserved"))
        for name in ("compact", "maximize", "stochastic_rounding"):
            check_bool(name, group[name])
        if group["max_grad_norm"] is not None:
            check_rate("max_grad_norm", group["max_grad_norm"])
            if not group["max_grad_norm"] > 0:
                raise ValueError(f"max_grad_norm: expected more than 0, got {group['max_grad_norm']}")
        check_rate("lr", group["lr"])
        check_rate("weight_decay", group["weight_decay"])

    def _all(self) -> list[tuple[dict[str, Any], Tensor]]:
        return [(group, p) for group in self.param_groups for p in group["params"]]

    def set_masks(self, masks: Mapping[Any, Tensor]) -> None:
        """The fixed masks of mode "D", for parameters by name (where the optimizer was given named_parameters()) or by
        themselves: bool of the parameter's shape, or packed as `fisher_masks` makes them. Parameters without one train
        normally. Moments of elements that stay selected are kept. To be called again after what puts other parameters
        in the place of these, as accelerate's prepare() does under FSDP."""
        if not isinstance(masks, Mapping):
            raise TypeError(f"masks: expected a mapping, got {type(masks).__name__}")
        by_name: dict[str, Tensor] = {}
        for group in self.param_groups:
            if "param_names" in group:
                by_name |= zip(group["param_names"], group["params"], strict=True)
        group_of = {id(p): group for group, p in self._all()}
        packed: dict[int, Tensor] = {}
        for key, mask in masks.items():
            p = by_name.get(key) if isinstance(key, str) else key
            if p is None or id(p) not in group_of:
                known = "named_parameters() as params" if not by_name else f"one of {', '.join(list(by_name)[:5])}, ..."
                got = repr(key) if isinstance(key, str) else "what is not one of the parameters"
                raise ValueError(f"masks: expected {known}, got {got}")
            if group_of[id(p)]["mode"] != "D":
                raise ValueError(f"masks: expected mode 'D' with masks, got {group_of[id(p)]['mode']!r}")
            packed[id(p)] = child_state.local_mask(f"masks[{key!r}]" if isinstance(key, str) else "masks", p, mask)
        for p in self._replaced():
            del self.state[p]
        # All of the state is made now, so that it is there to be loaded into.
        for number, (group, p) in enumerate(self._all()):
            if p.requires_grad and p not in self.state:
                self._begin(group, p, number, packed.get(id(p)))
            elif id(p) in packed:
                self._exchange_mask(group, p, packed[id(p)])

    set_gradient_mask = set_masks

    # --- state ---

    def _replaced(self) -> list[Tensor]:
        """Tensors that have a state and are parameters no more."""
        params = {id(p) for _, p in self._all()}
        return [p for p in self.state if id(p) not in params]

    def _compacts(self, group: Mapping[str, Any]) -> bool:
        return bool(group["compact"]) and group["mode"] == "D"

    def _moments_of(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return self.moments

    def _begin(self, group: dict[str, Any], p: Tensor, number: int, mask: Tensor | None) -> None:
        state: dict[str, Any] = {"step": torch.zeros((), dtype=torch.float32), "stream": number}
        for name in self._moments_of(group):
            state[name] = child_state.new_moment(p, mask, self._compacts(group))
        if mask is not None:
            state["mask"] = mask
        self.state[p] = state

    def _exchange_mask(self, group: dict[str, Any], p: Tensor, mask: Tensor) -> None:
        state = self.state[p]
        for name in self.moments:
            if name in state:
                dense = child_state.dense_moment(p, state[name], state.get("mask"))
                state[name] = child_state.stored_moment(dense, mask, self._compacts(group))
        state["mask"] = mask

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim. Where a parameter is a DTensor, or `dense_state_dict` is True, moments and masks have a
        value for each element, placed like the parameter, so that distributed checkpoints can share them out anew."""
        result = super().state_dict()
        params = self._all()
        if self.dense_state_dict or any(shards.is_sharded(p) for _, p in params):
            result["state"] = {
                i: child_state.present(params[i][1], state, self.moments, params[i][0]["mode"] == "D")
                for i, state in result["state"].items()
            }
        return result

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What state_dict gave, in either form, or the state of the plain optimizer of torch.optim. A group's saved
        options replace its own, as in torch.optim; a saved mask goes before the optimizer's. dtypes stay as saved for
        masks, and are those of child_state.py for moments. ValueError or TypeError for a state that does not fit, which
        then changes nothing."""
        states: dict[Tensor, Any] = {}

        def check(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            if not isinstance(saved, Mapping) or not {"state", "param_groups"} <= saved.keys():
                raise ValueError("state_dict: expected state and param_groups, got something else")
            sizes = [len(group.get("params", ())) for group in saved["param_groups"]]
            if sizes != [len(group["params"]) for group in self.param_groups]:
                own = [len(group["params"]) for group in self.param_groups]
                raise ValueError(f"param_groups: expected groups of {own} parameters, got {sizes}")
            pairs = zip(self.param_groups, saved["param_groups"], strict=True)
            groups = [self._saved_group(own, group) for own, group in pairs]
            states.update(self._saved_states(saved["state"], groups))
            return {**saved, "state": {}, "param_groups": groups}

        def install(optimizer: Optimizer) -> None:
            self.state.update(states)

        # torch.optim would cast every tensor of the state to the parameter's dtype: it gets to see none.
        hooks = [
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(install, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _saved_group(self, own: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
        if saved.get("amsgrad"):
            raise ValueError("amsgrad: expected False, got a state that was saved with amsgrad")
        options = {name: value for name, value in own.items() if name not in ("params", "param_names")}
        group = {**options, **{name: value for name, value in saved.items() if name not in FOREIGN}}
        self._check_group(group)
        return group

    def _saved_states(self, saved: Mapping[Any, Any], groups: list[dict[str, Any]]) -> dict[Tensor, Any]:
        numbered = [(index, group) for group in groups for index in group["params"]]
        params = [p for _, p in self._all()]
        place = {index: (i, group, params[i]) for i, (index, group) in enumerate(numbered)}
        states: dict[Tensor, Any] = {}
        for index, entry in saved.items():
            if index not in place:
                raise ValueError(f"state: expected the numbers of parameters, got {index!r}")
            i, group, p = place[index]
            own = self.state[p].get("mask") if p in self.state else None
            states[p] = child_state.take(
                f"state[{index}]", p, entry, self.moments, own, i, self._compacts(group), group["mode"] == "D"
            )
            for name in self._moments_of(group):
                if name not in states[p]:
                    states[p][name] = child_state.new_moment(p, states[p].get("mask"), self._compacts(group))
                    states[p]["step"].zero_()
        return states

    # --- the step ---

    def _init_group(
        self, group: dict[str, Any], params: list[Any], grads: list[Any], first: list[Any], second: list[Any],
        steps: list[Any], masks: list[Any], streams: list[int],
    ) -> None:  # fmt: skip
        """Collects the parameters of a group that have gradients, in lists that come empty; those without state get it.

        torch.compile knows optimizers by this method, and calls it instead of tracing it.
        """
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                continue
            if grad.layout != torch.strided:
                raise TypeError(f"params: expected dense gradients, got {grad.layout}")
            if p not in self.state or not self.state[p]:
                if any("mask" in self.state[other] for other in self._replaced()):
                    wanted = "the parameters that masks were given for"
                    raise ValueError(f"params: expected {wanted}, got others in their place: call set_masks(...) again")
                number = next(i for i, (_, other) in enumerate(self._all()) if other is p)
                self._begin(group, p, number, None)
            state = self.state[p]
            params.append(p)
            grads.append(grad)
            for values, name in zip((first, second), self.moments, strict=False):
                values.append(state.get(name))
            steps.append(state["step"])
            masks.append(state.get("mask"))
            streams.append(state["stream"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step with the gradients of all parameters that have one, which stay as they are. Returns what closure
        returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = []
        for group in self.param_groups:
            params: list[Any] = []
            grads: list[Any] = []
            first: list[Any] = []
            second: list[Any] = []
            steps: list[Any] = []
            masks: list[Any] = []
            streams: list[int] = []
            self._init_group(group, params, grads, first, second, steps, masks, streams)
            if not params:
                continue
            moments = [first, second][: len(self.moments)]
            runs: list[Any] = [None] * len(params)
            check_rate("lr", group["lr"])
            check_rate("weight_decay", group["weight_decay"])
            self._check_step(group, params, moments, masks)
            if any([shards.is_sharded(p) for p in params]):
                runs = [shards.runs_of(p) for p in params]
                grads = [shards.local_grad(p, g) for p, g in zip(params, grads, strict=True)]
            work.append((group, params, grads, moments, steps, masks, runs, streams))
        if not work:
            return loss
        check_not_captured([params[0] for _, params, *_ in work])
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None:
            shards.check_found_inf([p for _, params, *_ in work for p in params], found_inf)
        square_sum = self._square_sum(work) if work[0][0]["max_grad_norm"] is not None else None
        for group, params, *columns in work:
            self._run(group, [[shards.local(p) for p in params], *columns], square_sum)
        return loss

    def _check_step(self, group: dict[str, Any], params: list[Any], moments: list[list[Any]], masks: list[Any]) -> None:
        """What must hold before any parameter changes."""

    def _square_sum(self, work: list[Any]) -> Tensor:
        """Of all gradients: the sum over this process's elements, then over the processes that have others."""
        batches: dict[Any, tuple[Any, list[Tensor]]] = {}
        for _, params, grads, *_ in work:
            for p, g in zip(params, grads, strict=True):
                batches.setdefault((shards.layout(p), g.device, g.dtype), (p, []))[1].append(g)
        sums: list[Tensor] = []
        for p, grads in batches.values():
            backend = _backend.choose("child_update", self.backend, grads[0].device.type, grads[0].dtype)
            sums.append(shards.sum_over_shards(p, child_update.square_sum_of(backend)(grads)))
        if len({t.device for t in sums}) > 1:
            sums = [t.cpu() for t in sums]  # else the norm stays where it is, and nothing waits for the device
        total = sums[0]
        for t in sums[1:]:
            total = total + t
        return total

    def _run(self, group: dict[str, Any], given: list[Any], square_sum: Tensor | None) -> None:
        """A group's step, by device and dtype. given: params, grads, moments, steps, masks, runs, streams."""
        params, grads, moments, *others = given
        kinds = [(p.device.type, p.dtype) for p in params]
        for kind in dict.fromkeys(kinds):
            columns: list[Any] = [params, grads, *moments, *others]
            if any([other != kind for other in kinds]):
                chosen = [i for i, other in enumerate(kinds) if other == kind]
                columns = [[column[i] for i in chosen] for column in columns]
            lr, weight_decay = (
                v if isinstance(v, Tensor) else torch.scalar_tensor(v, dtype=torch.float64)
                for v in (group["lr"], group["weight_decay"])
            )
            scale, inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
            common = {
                "reserve_p": group["reserve_p"] if group["mode"] == "F" else None,
                "max_grad_norm": float(group["max_grad_norm"] or 0.0),
                "seed": group["seed"] if group["seed"] < 2**63 else group["seed"] - 2**64,
                "where": group["where"],
                "decay": group["decay"],
                "maximize": group["maximize"],
                "stochastic_rounding": group["stochastic_rounding"],
            }
            backend = _backend.choose("child_update", self.backend, *kind)
            arguments = (*columns, scale, inf, square_sum, lr, weight_decay)
            self._update(backend, group, arguments, common)

    def _update(self, backend: str, group: dict[str, Any], arguments: tuple[Any, ...], common: dict[str, Any]) -> None:
        raise NotImplementedError
