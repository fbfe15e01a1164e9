"""Compare the tensors of an adapter with the modules that its configuration says it changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set

from vllmlite.errors import ModelError
from vllmlite.lora.modules import DOWN, GATE_UP, Module, Modules, StackedExperts, item, transposed
from vllmlite.lora.peft_config import PeftConfig
from vllmlite.lora.peft_tensors import ModuleTensors
from vllmlite.weights.adapter import EMBEDDING, HEAD
from vllmlite.weights.checkpoint import listed

_BASE = ".base_layer"
"""Part of a module's name that PEFT repeats for each further parameter of the module that it wraps."""


class Targets:
    """The modules and parameters that an adapter changes, by the names that the model has for them."""

    def __init__(
        self, where: str, config: PeftConfig, modules: Modules, own: Mapping[str, ModuleTensors]
    ) -> None:
        """Collect the targets of ``own``, the tensors of the file ``where`` by canonical name
        (:meth:`Modules.canonical`)."""
        self.where, self.config, self.modules, self.own = where, config, modules, own
        self.stacked: dict[str, tuple[StackedExperts, str]] = {}
        """The modules that hold all experts of a layer, with the parameter that is changed."""
        self.ranks: dict[str, tuple[int, float]] = {}
        """Rank and scale for each module that has factors."""

    def check(self) -> None:
        """Raise ModelError unless the configuration applies the adapter to exactly the modules that have tensors. (PEFT
        ignores additional tensors, and leaves modules without tensors unchanged.)"""
        for name, tensors in self.own.items():
            experts = self.modules.stacked.get(name.replace(_BASE, ""))
            if experts is not None and tensors.factors:
                self.stacked[name] = experts, self._parameter(tensors, experts)
            elif tensors.whole is not None:
                self._check_whole(name, tensors)
            else:
                self.modules.find(self.where, name)
        changed = {
            name: tensors
            for name, tensors in self.own.items()
            if tensors.factors or tensors.magnitude is not None
        }
        parameters = {name: self._parameter_name(name, tensors) for name, tensors in changed.items()}
        if len(set(parameters.values())) < len(parameters):
            raise ModelError(f"{self.where}: has two changes of one parameter")
        by_parameter = self.config.targeted_parameters(parameters.values())
        self._check_beyond(
            {name: each for name, each in changed.items() if parameters[name] not in by_parameter}
        )
        self._check_absent(changed, set(parameters.values()))
        keys = {
            name: parameters[name] if parameters[name] in by_parameter else tensors.name
            for name, tensors in changed.items()
        }
        ranks = self.config.ranks(keys.values())
        self.ranks = {name: ranks[key] for name, key in keys.items()}

    def _check_beyond(self, changed: Mapping[str, ModuleTensors]) -> None:
        """Raise ModelError if ``target_modules`` does not name one of the modules."""
        linear = self.modules.linear()
        names = {name: tensors.name for name, tensors in changed.items()}
        accepted = self.config.targeted(
            [own for name, own in names.items() if name not in self.stacked],
            {own for name, own in names.items() if name in linear},
        )
        beyond = [own for name, own in names.items() if own not in accepted and name != self._implied()]
        if beyond:
            raise ModelError(
                f"{self.where}: has tensors of modules to which neither target_modules nor target_parameters of "
                f"{self.config.where} applies the adapter: {listed(beyond)}"
            )

    def _check_absent(self, changed: Mapping[str, ModuleTensors], parameters: Set[str]) -> None:
        """Raise ModelError if the file lacks a module or a parameter that the configuration names.

        In transformers 5 the weights of experts and routers are no modules, so that no file has them under
        ``target_modules``; earlier, all files have."""
        modules = self.modules
        kinds = {modules.kind(name) for name in changed if name in modules.by_name}
        targeted = self.config.targeted(modules.by_name, modules.linear())
        absent = [
            name
            for name in modules.by_name
            if name in targeted and name not in self.own and modules.kind(name) in (None, *kinds)
        ]
        present = {(name.replace(_BASE, ""), parameter) for name, (_, parameter) in self.stacked.items()}
        for name in modules.stacked:
            for parameter in (GATE_UP, DOWN):
                spellings = [f"{each}.{parameter}" for each in (name, modules.usual(name))]
                if self.config.targeted_parameters(spellings) and (name, parameter) not in present:
                    absent.append(spellings[0])
        if self.config.target_parameters:
            absent += [
                name
                for name in modules.by_name
                if name not in self.own
                and self.config.targeted_parameters([f"{name}.weight", f"{modules.usual(name)}.weight"])
            ]
        if absent:
            raise ModelError(
                f"{self.where}: lacks tensors of modules to which target_modules or target_parameters of "
                f"{self.config.where} applies the adapter: {listed(absent)}"
            )
        saved = [tensors.name for tensors in self.own.values() if tensors.whole is not None]
        for end in self.config.modules_to_save:
            if not any(name.endswith(end) for name in saved):
                raise self._lacks("modules_to_save", end)
        for end in self.config.target_parameters:
            if not any(name == end or name.endswith(f".{end}") for name in parameters):
                raise self._lacks("target_parameters", end)

    def _lacks(self, field: str, name: str) -> ModelError:
        return ModelError(
            f"{self.where}: has no tensors of {name[:200]!r}, which {field} of {self.config.where} names"
        )

    def _check_whole(self, name: str, tensors: ModuleTensors) -> None:
        """Raise ModelError if a module cannot be replaced.

        PEFT also saves embeddings that are not replaced, as a precaution; those are copies of the base model's."""
        shown = repr(tensors.name[:200])
        module = self.modules.by_name.get(name)
        if module is None or module.parts[0][0] not in (EMBEDDING, HEAD):
            raise ModelError(
                f"{self.where}: modules_to_save: replaces module {shown}; only the input embedding and the output "
                "layer can be replaced: merge the adapter into its base model"
            )
        if not self.config.saved([tensors.name]) and name != self._implied():
            tensors.base, tensors.whole = tensors.whole, None

    def _implied(self) -> str | None:
        """Return the output layer if the configuration says that it is changed together with the embedding."""
        return self.modules.keys.head if self.config.ensure_weight_tying and self.modules.tied else None

    def _parameter(self, tensors: ModuleTensors, experts: StackedExperts) -> str:
        """Return the parameter of ``experts`` that a module's factors change."""
        shapes = [tensors.factors[factor].shape for factor in "AB" if factor in tensors.factors]
        if len(shapes) == 2 and all(len(shape) == 2 for shape in shapes):
            found = experts.parameter(shapes[0][0], shapes[0][1], shapes[1][0])
            if found is not None:
                return found
        raise ModelError(
            f"{self.where}: module {tensors.name[:200]!r}: has factors of shapes {[list(shape) for shape in shapes]}; "
            f"expected those of {GATE_UP} or {DOWN} of {experts.count} experts of {experts.inner} x {experts.hidden}"
        )

    def _parameter_name(self, name: str, tensors: ModuleTensors) -> str:
        if name in self.stacked:
            return f"{tensors.name.replace(_BASE, '')}.{self.stacked[name][1]}"
        return f"{tensors.name}.weight"


def of_each_expert(
    where: str, tensors: ModuleTensors, module: Module
) -> Iterator[tuple[ModuleTensors, Module]]:
    """Yield a module's factors from a GGUF file in PEFT's shapes, with the module: one pair, or one for each expert of
    a mixture, which llama.cpp stacks. Raises ModelError, which begins with ``where``, for another number of experts."""
    factors = tensors.factors
    if module.is_embedding and "A" in factors:
        factors = {**factors, "A": transposed(factors["A"])}
    counts = {tensor.shape[0] for tensor in factors.values() if len(tensor.shape) == 3}
    if not counts:
        yield ModuleTensors(tensors.name, factors), module
        return
    (count, *others) = counts
    if others or any(len(tensor.shape) != 3 for tensor in factors.values()) or count != module.num_experts:
        raise ModelError(
            f"{where}: module {tensors.name[:200]!r}: its factors are for {sorted({count, *others})} experts; the base "
            f"model has {module.num_experts}"
        )
    for index in range(count):
        own = {factor: item(tensor, index) for factor, tensor in factors.items()}
        yield ModuleTensors(f"{tensors.name}[{index}]", own), module.expert(index, count)
