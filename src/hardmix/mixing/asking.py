"""What policies share that ask a model about each batch: how they hold it, and what their copies look at."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from hardmix.mixing.draw import LabelPairing
from hardmix.mixing.gradients import check_model, without_ddp
from hardmix.mixing.policy import Policy


class Asked:
    """A model that somebody looks at from outside: no submodule of its holder, and not copied with it.

    A deep copy holds the same model, or a copy of it if that or a part of it was copied before in the same call of
    `copy.deepcopy`. A pickle holds the model if `pickled` is set, else none.

    >>> import copy
    >>> model = nn.Linear(2, 2)
    >>> copy.deepcopy(Asked(model)).model is model
    True
    >>> twin, asked = copy.deepcopy([model, Asked(model)])
    >>> asked.model is twin
    True
    """

    def __init__(self, model: nn.Module | None, *, pickled: bool = True) -> None:
        self.model, self.pickled = model, pickled

    def __deepcopy__(self, memo: dict[int, Any]) -> Asked:
        model = self.model
        if model is not None and any(id(part) in memo for part in model.modules()):
            model = copy.deepcopy(model, memo)
        return Asked(model, pickled=self.pickled)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "model": self.model if self.pickled else None}


class AskingPolicy(Policy):
    """A policy that asks a model about each batch, or follows one. The model is no part of it: no parameters, no state.

    A deep copy of the policy asks the same model, unless that, or a part of it, is copied in the same call and before
    it: of `copy.deepcopy([model, policy])` the second asks the first. A module that holds both registers the model
    first, or its copy needs `attach`. A pickle of the policy holds the model, so that an
    unpickled one asks a model of its own; `pickle.dumps([model, policy])` keeps the two together. `attach` names
    another model. Of a DistributedDataParallel the module inside is asked, so that ranks don't wait for each other, and
    names of layers are those in it.
    """

    #: whether None may stand for a model
    needs_model = True
    #: whether pickles hold the model. Where it has to be the one that is trained, another is of no use.
    pickles_model = True

    def __init__(
        self,
        model: nn.Module | None,
        *,
        alpha: float = 1.0,
        per: str = "sample",
        pairing: str | LabelPairing | None = None,
    ) -> None:
        super().__init__(alpha=alpha, per=per, pairing=pairing)
        self._asked = Asked(None)
        if self.needs_model or model is not None:
            AskingPolicy.attach(self, model)  # type: ignore[arg-type]  # refuses None

    @property
    def asked(self) -> nn.Module | None:
        """The model that is asked, if there is one."""
        return self._asked.model

    def attach(self, model: nn.Module) -> None:
        """Ask `model` from now on."""
        self._asked = Asked(without_ddp(check_model(type(self).__name__, model)), pickled=self.pickles_model)

    def _model(self) -> nn.Module:
        """The model of a policy that can't do without."""
        if self._asked.model is None:
            raise RuntimeError(
                f"{type(self).__name__}: this policy was unpickled without its model; call attach(model)."
            )
        return self._asked.model
