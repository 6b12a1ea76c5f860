"""Records what a few training steps of a Mixture-of-Experts model really did, for `moe-audit check --trace DIR`.

With the Hugging Face Trainer (and whatever derives from it: TRL, axolotl, LLaMA-Factory, ms-swift):

    from moe_audit_recorder import MoeAuditCallback
    trainer.add_callback(MoeAuditCallback("trace", steps=[0, 1]))

In a loop of your own:

    recorder = Recorder(model, "trace", optimizer=optimizer, steps=[0, 1])
    ...                                   # your loop, unchanged
    recorder.close()

Needs torch >= 2.1 and safetensors; transformers only for the callback. It reads and never writes: no random number is drawn,
no tensor of the run is changed, and hooks exist only while a wanted step runs. On trouble it warns once, removes its hooks and
lets the training go on. docs/recorder.md says what is recorded and what it costs; docs/trace.md is the format.
"""
import atexit
import contextlib
import functools
import importlib.metadata
import inspect
import json
import os
import random
import re
import sys
import warnings

import torch
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

VERSION = "1"
__all__ = ["MoeAuditCallback", "Recorder", "find_routers"]

# --- finding the routers ---------------------------------------------------------------------------------------------

_ROUTER_CLASS = re.compile(r"router|gating|topkgate|moe\w*gate$", re.I)  # not Qwen3_5MoeGatedDeltaNet
_ROUTER_LEAVES = {"gate", "router", "wg", "router_gate"}
_EXPERTS_KEY = re.compile(r"^(n|num|moe_num|n_total|num_local|n_routed|num_routed)_(\w+_)?experts$|^moe_num_experts$")
_COUNTERS = {"tokens_per_expert", "local_tokens_per_expert"}  # torchtitan, Megatron-LM
_CORRECTION_BIASES = {"e_score_correction_bias", "expert_bias", "correction_bias", "balancing_biases"}
# A layer's second router, which sees the tokens of images alone (ERNIE-4.5-VL); the call says which these are.
_FOR_IMAGES, _IMAGES = re.compile(r"\.vision_moe\."), "moe_mm_token_type_ids"
_PARALLEL = {"DistributedDataParallel", "DeepSpeedEngine", "FullyShardedDataParallel"}
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|original_module)(?=\.|$)")


def _config_dict(model):
    config = getattr(model, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else dict(config) if isinstance(config, dict) else {}


def _expert_counts(config, found=None):
    """Every number of experts that a config names, at any depth (text_config, ffn_config, lists of one number a layer)."""
    found = set() if found is None else found
    for key, value in config.items():
        if isinstance(value, dict):
            _expert_counts(value, found)
        elif _EXPERTS_KEY.match(str(key)) and "shared" not in key:
            found.update(v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int) and v > 1)
    return found


def _deep(config, *keys):
    """The first of these keys that the config or one of its sub-configs has."""
    for key in keys:
        if config.get(key) is not None:
            return config[key]
    for value in config.values():
        if isinstance(value, dict) and (hit := _deep(value, *keys)) is not None:
            return hit
    return None


def _shape(parameter):
    return tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty tensor behind


def _weights(module, experts=None):
    """(name, parameter) of the [E, d] weights in a router: under PEFT's modules_to_save there are two."""
    return [(n, p) for n, p in module.named_parameters()
            if p.dim() == 2 or hasattr(p, "ds_shape") and len(p.ds_shape) == 2
            if "lora_" not in n and (experts is None or _shape(p)[0] in experts) and _shape(p)[0] > 1]


def _expert_list(block, count):
    """The modules of `count` experts, where each expert is one."""
    for module in block.modules():
        if isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict)) and len(module) == count:
            return list(module.values() if isinstance(module, torch.nn.ModuleDict) else module)
    return None


def _expert_stacks(block, router, count, adapters=True):
    """Parameters [count, ...] that hold every expert in one tensor, and what PEFT put on them."""
    routed = {id(p) for p in router.parameters()}
    return [(n, p) for n, p in block.named_parameters() if id(p) not in routed and "shared" not in n and (adapters or "lora_" not in n)
            if len(_shape(p)) >= 3 and _shape(p)[0] == count or "expert" in n and len(_shape(p)) == 2 and
            (_shape(p)[0] == count or "lora_A" in n and _shape(p)[0] % count == 0 or "lora_B" in n and _shape(p)[1] % count == 0)]


class _Layer:
    """One router of the model, what owns it, and what one forward of it showed."""

    def __init__(self, number, name, router, block, weight_name, weight, top_k, experts):
        self.number, self.name, self.router, self.block = number, name, router, block
        self.for_images = None  # or whether it is the one of two routers in a layer that sees the tokens of images
        self.weight_name, self.hidden_size = weight_name, _shape(weight)[1]
        # `rows` of the weight: one an expert, and where there are more either choices that run no expert (ZAYA, LongCat), which count
        # as experts here, or shared experts (Inkling), which are behind those that a correction bias has a number for and are left out.
        self.rows, self.experts = _shape(weight)[0], experts
        self.num_experts = self.rows
        if self.rows != experts:
            self.num_experts = experts
            if self.correction_bias() is None:
                self.num_experts = self.rows
        self.top_k = top_k
        # Gemma 4 norms what it gets and scales it by a vector of its own: the module below sees what the weight is multiplied with.
        norms = "." in weight_name and (self.rows != experts or any(p.numel() == self.hidden_size for p in router.parameters(recurse=False)))
        self.product = router.get_submodule(weight_name.rpartition(".")[0]) if norms else None
        self.logits_dtype, self.block_hooks = None, []
        self.clear()

    def clear(self):
        self.inside, self.alone, self.mode = False, False, None
        self.hidden = self.linear = self.output = self.selected = self.weights = self.scattered = None

    def weight(self):
        """The parameter as it is now: wrappers come and go, so it is looked up again."""
        mine = _weights(self.router, {self.rows})
        trainable = [p for _, p in mine if p.requires_grad]
        return trainable[0] if trainable else mine[0][1]

    def lora(self):
        return any("lora_" in n for n, _ in self.router.named_parameters())

    def one_per_expert(self, names):
        """The parameter or buffer [E] of one of these names: the correction bias, a counter."""
        for owner in (self.router, self.block):
            for name, tensor in [*owner.named_parameters(), *owner.named_buffers()]:
                if name.rsplit(".", 1)[-1] in names and tensor.numel() == self.num_experts:
                    return tensor
        return None

    def correction_bias(self):
        return self.one_per_expert(_CORRECTION_BIASES)

    # What the block computes between the router and the experts, where no module returns it.
    _KEEPS_WEIGHTS = {"to", "type", "type_as", "float", "half", "bfloat16", "softmax", "sigmoid", "div", "true_divide", "mul",
                      "multiply", "div_", "mul_", "__truediv__", "__itruediv__", "__mul__", "__imul__", "__rmul__", "__idiv__"}

    def see(self, function, args, kwargs, out):
        name = getattr(function, "__name__", "")
        if name == "linear":
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            if self.inside and weight is not None and tuple(weight.shape)[0] == self.rows == out.shape[-1] and \
                    tuple(weight.shape)[1] == self.hidden_size:
                self.linear = out
        elif name == "topk":
            source = args[0] if args else kwargs.get("input")
            if source.shape[-1] == self.num_experts and (not self.top_k or out[1].shape[-1] == self.top_k):
                self.weights, self.selected, self.scattered = out[0], out[1], None
        elif name == "gather":
            index = args[2] if len(args) > 2 else kwargs.get("index")
            if index is not None and index is self.selected:
                self.weights = out
        elif name in ("scatter", "scatter_"):  # weights spread over [tokens, E]: Llama 4, gpt-oss of transformers 4
            index = args[2] if len(args) > 2 else kwargs.get("index")
            if index is not None and index is self.selected and out.is_floating_point() and out.shape[-1] == self.num_experts:
                source = args[3] if len(args) > 3 else kwargs.get("src")
                if source is self.weights and source is not None:
                    self.scattered = out
        elif self.scattered is not None and args and args[0] is self.scattered:
            if name in self._KEEPS_WEIGHTS or name in ("transpose", "t"):
                self.scattered = out
        elif name in ("cat", "concat", "concatenate"):  # PhiMoE chooses one expert after the other
            if out.dim() >= 2 and (self.top_k or 1) > 1 and out.shape[-1] == self.top_k and len(args[0]) == self.top_k:
                if out.is_floating_point():
                    self.weights = out
                elif out.dtype in (torch.int64, torch.int32):
                    self.selected = out
        elif name in self._KEEPS_WEIGHTS and args and args[0] is self.weights and self.weights is not None:
            if isinstance(out, torch.Tensor) and out.shape == self.weights.shape and out.is_floating_point():
                self.weights = out

    def logits(self):
        """What the router computed before any softmax; its plain output where a router is one linear map."""
        if isinstance(self.output, torch.Tensor):
            if self.output.shape[-1] == self.num_experts and (self.lora() or self.linear is None):
                return self.output
        return self.linear

    def cut(self, logits):
        """Without the columns of shared experts."""
        return logits if logits.shape[-1] == self.num_experts else logits[..., :self.num_experts]

    def routing(self):
        """(selected, weights), each [tokens, k] or None: what the router returned, else what the block computed."""
        selected, weights = self.selected, self.weights
        if self.scattered is not None:
            spread = self.scattered.detach()
            spread = spread.t() if spread.dim() == 2 and spread.shape[0] == self.num_experts != self.hidden_rows else spread
            weights = spread.reshape(-1, self.num_experts).gather(1, selected.reshape(-1, selected.shape[-1]))
        if isinstance(self.output, (tuple, list)):
            tensors = [t for t in self.output if isinstance(t, torch.Tensor) and t.dim() >= 2]
            ids = [t for t in tensors if not t.is_floating_point() and t.dtype != torch.bool
                   and t.numel() == self.hidden_rows * t.shape[-1]
                   # Switch and NLLB return masks [tokens, E] instead.
                   and (t.shape[-1] == self.top_k if self.top_k else t.shape[-1] < self.num_experts)]
            if len(ids) == 1:
                exact = [t for t in tensors if t.is_floating_point() and t.shape == ids[0].shape]
                weights = exact[0] if len(exact) == 1 else weights if ids[0] is selected and self.rows == self.experts else None
                if selected is None or self.num_experts == self.experts:  # ZAYA puts expert 0 for the choice that runs none
                    selected = ids[0]
        if selected is None or weights is not None and weights.numel() != selected.numel():
            weights = None
        return selected, weights


def _with_more_rows(router, block, counts):
    """(name, weight, experts) of a router's last matrix that has more rows than the block has experts, though not twice as many."""
    for experts in sorted(counts, reverse=True):
        rows = [(_shape(w)[0], n, w) for n, w in _weights(router) if experts < _shape(w)[0] < 2 * experts]
        if rows and _expert_stacks(block, router, experts, False):
            _, name, weight = min(rows, key=lambda r: r[0])
            return name, weight, experts
    return None, None, None


def find_routers(model):
    """The routers of a model in forward order, as _Layer, by the class and the shape of modules."""
    config = _config_dict(model)
    counts = _expert_counts(config)
    configured_k = _deep(config, "num_experts_per_tok", "moe_topk", "top_k_experts", "moe_k", "moe_top_k", "num_experts_per_token")
    modules = dict(model.named_modules())
    found, taken = [], []
    for name, module in modules.items():
        if any(name.startswith(t + ".") for t in taken) or not name:
            continue
        leaf = name.rsplit(".", 1)[-1]
        by_class = bool(_ROUTER_CLASS.search(type(module).__name__))
        if not by_class and leaf not in _ROUTER_LEAVES:
            continue
        block = modules[name.rsplit(".", 1)[0]] if "." in name else model
        for weight_name, weight in _weights(module):
            experts = _shape(weight)[0]
            # A gate of something else has no such number of experts beside it.
            if by_class and experts in counts or _expert_list(block, experts) or _expert_stacks(block, module, experts, False):
                break
        else:
            weight_name, weight, experts = _with_more_rows(module, block, counts) if by_class else (None, None, None)
            if weight is None:
                continue
        top_k = next((v for owner in (module, *module.modules(), block) for key in ("top_k", "topk", "num_experts_per_tok", "moe_top_k")
                      if isinstance(v := getattr(owner, key, None), int) and not isinstance(v, bool)), configured_k)
        if isinstance(top_k, (list, tuple)):
            top_k = top_k[0]
        taken.append(name)
        found.append((name, module, block, weight_name, weight, top_k, experts))
    numbers = [re.search(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.", f[0]) for f in found]
    numbers = [int(m.group(1)) if m else None for m in numbers]
    second = [bool(_FOR_IMAGES.search(f[0])) for f in found]
    first = [n for n, s in zip(numbers, second) if not s]
    if None in numbers or len(set(first)) < len(first):  # encoder and decoder, two stacks: counted through
        numbers = range(len(found))
    elif any(second):  # behind all layers
        numbers = [n + (max(numbers) + 1) * s for n, s in zip(numbers, second)]
    layers = [_Layer(n, *f) for n, f in zip(numbers, found)]
    for layer, for_images in zip(layers, second):
        layer.for_images = for_images if any(second) else None
    return layers


class _Watch(TorchFunctionMode):
    """Sees the torch functions that a MoE block calls; passes each on unchanged."""

    def __init__(self, layer, trouble):
        super().__init__()
        self.layer, self.trouble = layer, trouble

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        try:
            self.layer.see(function, args, kwargs or {}, out)
        except Exception as e:  # noqa: BLE001
            self.trouble(e)
        return out


# --- what one forward and one step showed ----------------------------------------------------------------------------

def _copy(tensor):
    return tensor.detach().to("cpu", copy=True).contiguous()


def _number(value):
    if isinstance(value, torch.Tensor):
        return value.detach().item() if value.numel() == 1 else None
    return value if isinstance(value, (int, float)) else None


def _in_backward():
    return torch._C._current_graph_task_id() != -1


def _is_sharded(parameter):
    return hasattr(parameter, "ds_id") or hasattr(parameter, "placements") or getattr(parameter, "_is_flat_param", False)


class _MicroBatch:
    def __init__(self, step, number, model, call, wanted):
        self.step, self.number, self.call = step, number, call
        self.tensors, self.record = {}, {}
        ids = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
        self.batch = tuple(ids.shape[:2]) if isinstance(ids, torch.Tensor) and ids.dim() >= 2 else None
        self.tokens = self.batch[0] * self.batch[1] if self.batch else None
        self.sampled = None
        if self.tokens and wanted is not None and wanted < self.tokens:
            # A generator of its own: the run's random numbers stay as they were.
            self.sampled = torch.tensor(sorted(random.Random(1000003 * step + number).sample(range(self.tokens), wanted)))
        self.record.update(tokens=self.tokens, batch=list(self.batch) if self.batch else None, sampled_tokens=wanted if self.sampled is not None else None,
                           training=model.training)
        self.forwarded = False
        self.hooks = []
        images = call.get(_IMAGES)
        of_images = isinstance(images, torch.Tensor) and images.numel() == self.tokens and bool(images.any())
        self.images = images.detach().reshape(-1).to("cpu") != 0 if of_images else None

    def keep(self, name, rows, seen=None):
        """A per-token tensor, [tokens, ...] or of the tokens `seen`: the sampled rows of it, on the CPU."""
        rows = rows.detach()
        if self.sampled is not None and seen is not None:
            rows = rows[torch.isin(seen, self.sampled).to(rows.device)]
        elif self.sampled is not None and rows.shape[0] == self.tokens:
            rows = rows.index_select(0, self.sampled.to(rows.device))
        if seen is None or len(rows) > 0:
            self.tensors[name] = _copy(rows)

    def seen_by(self, layer):
        """Positions of the tokens that one of two routers sees; None: of all."""
        if layer.for_images is None or self.images is None:
            return torch.zeros(0, dtype=torch.int64) if layer.for_images else None
        return (self.images == layer.for_images).nonzero().reshape(-1)

    def keep_seen(self, layer):
        """Which of the recorded rows are a router's, where these are not all."""
        seen = self.seen_by(layer)
        if seen is not None:
            rows = seen if self.sampled is None else torch.isin(self.sampled, seen).nonzero().reshape(-1)
            self.tensors[f"layer.{layer.number}.seen"] = rows.to(torch.int32)


class Recorder:
    """Records the wanted optimizer steps of `model` into `trace_dir`.

    steps: optimizer steps to record, counted from 0. optimizer: step boundaries are then seen by its hooks; without it call
    before_step() and after_step() around optimizer.step(). max_tokens: keep so many token positions of each micro-batch
    (all without it). hidden_states: keep the routers' inputs, too. evaluation: record forwards in eval mode as well.
    training: facts for trace.json's "training" (gradient_accumulation_steps, max_grad_norm, mixed_precision, ...)."""

    def __init__(self, model, trace_dir, steps=(0, 1), optimizer=None, max_tokens=None, hidden_states=False, evaluation=False,
                 training=None):
        while type(model).__name__ in _PARALLEL:  # what they return is not what the model's own loss is made of
            model = model.module
        self.model, self.dir, self.steps, self.max_tokens = model, str(trace_dir), set(steps), max_tokens
        self.hidden_states, self.evaluation, self.training = hidden_states, evaluation, dict(training or {})
        self.dead, self.warned, self.handles, self.optimizer_handles = False, set(), [], []
        self.step, self.micro_batches, self.current, self.parked, self.pending = None, 0, None, None, None
        self.layers, self.extra, self.output_router_logits, self.opened, self.static = [], {}, None, False, None
        self.backward, self.accumulated, self.probes = None, {}, []
        atexit.register(self.close)
        self._guarded(self._setup)(optimizer)

    # -- life

    def _setup(self, optimizer):
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if distributed else int(os.environ.get("RANK", 0))
        self.world_size = torch.distributed.get_world_size() if distributed else int(os.environ.get("WORLD_SIZE", 1))
        if type(self.model).__name__ == "OptimizedModule" or getattr(self.model, "_compiled_call_impl", None) is not None:
            return self._stop("the model is compiled, and hooks would break its graphs: record a run without torch.compile")
        self.layers = find_routers(self.model)
        if not self.layers:
            return self._stop(f"no router found in {type(self.model).__name__}: nothing is recorded")
        self.sharded = any(_is_sharded(p) for p in self.model.parameters())
        if self.sharded:
            self._warn("sharded", "parameters are sharded (FSDP or ZeRO-3): weights, gradients and norms are not recorded")
        if optimizer is not None:
            optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper
            self.optimizer_handles = [optimizer.register_step_pre_hook(lambda o, *_: self.before_step(o)),
                                      optimizer.register_step_post_hook(lambda *_: self.after_step())]
        self._start_step(0)

    def close(self):
        """Writes what is pending and removes every hook."""
        self._guarded(self._close)()

    def _close(self):
        self._flush()
        self._finish_step()
        self._disarm()
        for handle in self.optimizer_handles:
            handle.remove()
        self.optimizer_handles, self.steps = [], set()
        atexit.unregister(self.close)

    def _stop(self, why):
        self.dead = True
        self._warn("stop", why)
        self._disarm()
        for handle in self.optimizer_handles:
            handle.remove()
        self.current = self.pending = None

    def _warn(self, key, message):
        if key not in self.warned:
            self.warned.add(key)
            warnings.warn(f"moe_audit_recorder: {message}", RuntimeWarning, stacklevel=3)

    def _trouble(self, error):
        with contextlib.suppress(Exception):
            self._stop(f"recording stopped, the training goes on: {type(error).__name__}: {error}")

    def _guarded(self, method):
        @functools.wraps(method)
        def call(*args, **kwargs):
            if self.dead:
                return None
            try:
                with torch.no_grad():
                    return method(*args, **kwargs)
            except Exception as e:  # noqa: BLE001
                return self._trouble(e)
        return call

    # -- hooks

    def _arm(self):
        if self.handles:
            return
        guard = self._guarded
        put = self.handles.append
        for layer in self.layers:
            put(layer.router.register_forward_pre_hook(guard(functools.partial(self._router_begins, layer)), with_kwargs=True))
            put(layer.router.register_forward_hook(guard(functools.partial(self._router_ends, layer))))
            if layer.product is not None and self.hidden_states:
                put(layer.product.register_forward_pre_hook(guard(functools.partial(self._product_begins, layer))))
            if not layer.block_hooks:
                # The end also when the block leaves by an exception: non-reentrant checkpointing stops a recomputation that way.
                layer.block_hooks = [
                    layer.block.register_forward_pre_hook(guard(functools.partial(self._block_begins, layer))),
                    layer.block.register_forward_hook(functools.partial(self._block_ends, layer), always_call=True),
                    layer.router.register_forward_hook(functools.partial(self._alone_ends, layer), always_call=True)]
        if not self.sharded:  # what accumulates, before it is clipped: of the routers, or of some that are trained
            self.probes = [w for layer in self.layers if (w := layer.weight()).requires_grad and w.is_leaf] or \
                [p for p in self.model.parameters() if p.requires_grad and p.is_leaf][-4:]
            for i, probe in enumerate(self.probes):
                put(probe.register_post_accumulate_grad_hook(guard(functools.partial(self._accumulate, i))))
        begins = guard(self._model_begins)
        put(self.model.register_forward_pre_hook(lambda m, a, k: begins(m, a, k, torch.is_grad_enabled()), with_kwargs=True))
        put(self.model.register_forward_hook(guard(self._model_ends)))
        self._watch_backward()

    def _disarm(self):
        for handle in self.handles:
            handle.remove()
        self.handles = []
        for layer in self.layers:
            if layer.mode is None:  # else its block still runs, and the hook at its end has to take the mode away
                for handle in layer.block_hooks:
                    handle.remove()
                layer.block_hooks = []
        if self.backward is not None and torch.autograd.backward is self.backward[1]:
            torch.autograd.backward = self.backward[0]
            self.backward = None

    def _watch_backward(self):
        """The tensor that the trainer gives to backward is seen nowhere else."""
        original = torch.autograd.backward

        @functools.wraps(original)
        def backward(*args, **kwargs):
            inner = self.dead or _in_backward()
            if not inner:
                self._guarded(self._backward_begins)(args[0] if args else kwargs.get("tensors"))
            result = original(*args, **kwargs)
            if not inner:
                self._guarded(self._backward_ends)()
            return result

        torch.autograd.backward = backward
        self.backward = (original, backward)

    def _call(self, args, kwargs):
        names = [p for p in inspect.signature(self.model.forward).parameters] if args else []
        return {**dict(zip(names, args)), **kwargs, **self.extra}

    def _model_begins(self, model, args, kwargs, grad_enabled):
        if _in_backward():
            return
        self.current, self.parked = self.current or self.parked, None
        if model.training and not grad_enabled or not model.training and not self.evaluation:
            self.current, self.parked = None, self.current  # a reference pass before the backward, or an evaluation: not recorded
            return
        self._flush()
        if self.micro_batches == 0:
            self._finish_step()
            self.bias_before = {} if self.sharded else {
                layer.number: _copy(bias.reshape(-1)) for layer in self.layers if (bias := layer.correction_bias()) is not None}
        self.current = _MicroBatch(self.step, self.micro_batches, model, self._call(args, kwargs), self.max_tokens)
        self.micro_batches += 1
        asked = self.current.call.get("output_router_logits")
        if asked is not None:
            self.output_router_logits = bool(asked)
        for layer in self.layers:
            layer.clear()

    def _block_begins(self, layer, block, args):
        if self.current is None:
            return
        layer.clear()
        layer.mode = _Watch(layer, self._trouble)
        layer.mode.__enter__()

    def _router_begins(self, layer, router, args, kwargs):
        if self.current is None:
            return
        if layer.mode is None:  # the router runs without its block's forward: JetMoE's attention, Gemma 4's second forward
            self._block_begins(layer, None, None)
            layer.alone = True
        layer.inside, layer.linear, layer.output = True, None, None
        hidden = args[0] if args else next(v for v in kwargs.values() if isinstance(v, torch.Tensor))
        layer.hidden_rows = hidden.numel() // hidden.shape[-1]
        if self.hidden_states:
            layer.hidden = hidden.detach().reshape(-1, hidden.shape[-1]).clone()

    def _product_begins(self, layer, module, args):
        if layer.inside:
            layer.hidden = args[0].detach().reshape(-1, args[0].shape[-1]).clone()

    def _router_ends(self, layer, router, args, output):
        layer.inside = False
        if self.current is None:
            return
        layer.output = output
        logits = layer.logits()
        if logits is None:
            self._warn("logits", f"{layer.name} ({type(router).__name__}) shows no logits")
            return
        prefix, current = f"layer.{layer.number}.", self.current
        if not _in_backward() and prefix + "router_logits" not in current.tensors:
            layer.logits_dtype = str(logits.dtype).removeprefix("torch.")
            self._rows(layer, "router_logits", layer.cut(logits))
        if logits.requires_grad:
            def gradient(grad, current=current, layer=layer):
                if grad is not None:
                    self._guarded(self._rows)(layer, "logits_grad", layer.cut(grad), current)
            current.hooks.append(logits.register_hook(gradient))

    def _rows(self, layer, name, tensor, current=None):
        current = current or self.current
        rows = tensor.reshape(-1, tensor.shape[-1])
        if current.tokens is None:
            current.tokens = current.record["tokens"] = rows.shape[0]
        seen = current.seen_by(layer)
        if rows.shape[0] != (current.tokens if seen is None else len(seen)):
            self._warn("rows", f"{layer.name} saw {rows.shape[0]} of the batch's {current.tokens} tokens: its rows are not recorded")
            return
        if name.endswith("selected_experts") and layer.num_experts < 1 << 15:
            rows = rows.to(torch.int16)
        current.keep(f"layer.{layer.number}.{name}", rows, seen)

    def _block_ends(self, layer, block, args, output):
        if layer.mode is not None:
            mode, layer.mode = layer.mode, None
            mode.__exit__(None, None, None)
        self._guarded(self._block_ended)(layer)

    def _alone_ends(self, layer, router, args, output):
        if layer.alone:
            self._block_ends(layer, router, args, output)

    def _block_ended(self, layer):
        if self.current is None or layer.output is None:
            return
        selected, weights = layer.routing()
        prefix, tensors = f"layer.{layer.number}.", self.current.tensors
        if _in_backward():
            if selected is not None:
                self._rows(layer, "recomputed_selected_experts", selected)
        elif prefix + "tokens_per_expert" in tensors:
            self._warn("again", f"{layer.name} ran more than once in one forward: the first is recorded")
        else:
            if layer.hidden is not None:
                self._rows(layer, "hidden_states", layer.hidden)
            if selected is not None:
                self._rows(layer, "selected_experts", selected)
                ids = selected.detach().reshape(-1).to("cpu", torch.int64)
                tensors[prefix + "tokens_per_expert"] = torch.bincount(ids[(ids >= 0) & (ids < layer.num_experts)],
                                                                       minlength=layer.num_experts)
            else:
                self._warn("selection", f"{layer.name} ({type(layer.router).__name__}) shows no selection; logits are recorded")
            if weights is not None:
                self._rows(layer, "routing_weights", weights)
        layer.clear()

    def _model_ends(self, model, args, output):
        current = self.current
        if current is None and self.parked is not None and not _in_backward():
            self.current, self.parked = self.parked, None
            return
        if current is None or _in_backward():
            return
        current.forwarded = True
        for layer in self.layers:
            current.keep_seen(layer)
        get = output.get if isinstance(output, dict) else functools.partial(getattr, output)
        loss, aux = get("loss", None), get("aux_loss", None)
        record = current.record
        record.update(returned_loss=_number(loss), ce=None, aux_loss=_number(aux), z_loss=_number(get("z_loss", None)))
        if isinstance(aux, torch.Tensor):  # reentrant checkpointing gives logits without a graph: a balance loss for show
            record["aux_loss_requires_grad"] = aux.requires_grad
        for name, value in (("loss_grad", loss), ("aux_loss_grad", aux)):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                def gradient(grad, name=name, record=record):
                    if grad is not None:
                        self._guarded(record.__setitem__)(name, grad.item())
                current.hooks.append(value.register_hook(gradient))
        returned = get("router_logits", None)
        if isinstance(returned, (tuple, list)):
            returned = [t for t in returned if isinstance(t, torch.Tensor)]
            if len(returned) == len(self.layers):
                for layer, t in zip(self.layers, returned):
                    self._returned_logits(layer, t)
        self._masks(get("logits", None), get("log_probs", None))
        if not model.training:
            self._flush()

    def _returned_logits(self, layer, tensor):
        name = f"layer.{layer.number}."
        mine = self.current.tensors.get(name + "router_logits")
        if mine is None or tensor.shape[-1] != layer.num_experts:
            return
        self._rows(layer, "returned_router_logits", tensor)
        theirs = self.current.tensors.get(name + "returned_router_logits")
        if theirs is not None and theirs.dtype == mine.dtype and torch.equal(theirs, mine):
            del self.current.tensors[name + "returned_router_logits"]

    def _masks(self, logits, log_probs):
        current = self.current
        call, tokens = current.call, current.tokens
        if not current.batch:
            return
        mask = call.get("attention_mask")
        if mask is None:
            mask = torch.ones(current.batch, dtype=torch.uint8)
        if isinstance(mask, torch.Tensor) and mask.numel() == tokens:
            current.keep("token_mask", (mask.reshape(-1) != 0).to(torch.uint8))
        items = call.get("num_items_in_batch")
        current.record["num_items_in_batch"] = _number(items)
        if getattr(getattr(self._inner(), "config", None), "is_encoder_decoder", False):
            return  # the labels are another sequence's
        labels = call.get("shift_labels")
        if labels is None and isinstance(call.get("labels"), torch.Tensor) and tuple(call["labels"].shape) == current.batch:
            labels = torch.nn.functional.pad(call["labels"], (0, 1), value=-100)[..., 1:]
        if not isinstance(labels, torch.Tensor) or labels.numel() != tokens:
            return
        labels = labels.reshape(-1)
        counts = labels != -100
        current.record["label_tokens"] = int(counts.sum())
        current.keep("label_mask", counts.to(torch.uint8))
        if isinstance(logits, torch.Tensor) and logits.dim() == 3 and logits.shape[0] * logits.shape[1] == tokens:
            logits = logits.detach().reshape(tokens, -1)
            wanted = torch.arange(tokens) if current.sampled is None else current.sampled
            losses = torch.zeros(len(wanted), dtype=torch.float32)
            with torch.autocast(logits.device.type, enabled=False):
                for part in range(0, len(wanted), 256):  # 256 rows: a vocabulary of 150,000 then takes 150 MB
                    rows = wanted[part:part + 256].to(logits.device)
                    losses[part:part + 256] = torch.nn.functional.cross_entropy(
                        logits[rows].float(), labels.to(logits.device)[rows].long(), ignore_index=-100, reduction="none").cpu()
            current.tensors["token_loss"] = losses
        elif isinstance(log_probs, torch.Tensor) and log_probs.dim() == 2 and log_probs.shape[0] == current.batch[0] and \
                current.batch[1] - log_probs.shape[1] in (0, 1):  # TRL 1.x returns these instead of logits
            losses = torch.nn.functional.pad(-log_probs.detach().float(), (0, current.batch[1] - log_probs.shape[1])).reshape(-1)
            current.keep("token_loss", losses.masked_fill(~counts.to(losses.device), 0))

    def _backward_begins(self, tensors):
        current = self.current
        if current is None or not current.forwarded:
            return
        tensor = tensors[0] if isinstance(tensors, (tuple, list)) else tensors
        if isinstance(tensor, torch.Tensor) and tensor.numel() == 1:
            current.record["loss"] = tensor.detach().item()

    def _backward_ends(self):
        if self.current is not None and self.current.forwarded:
            self._flush()

    def _accumulate(self, number, parameter):
        if parameter.grad is not None:
            self.accumulated[number] = parameter.grad.detach().clone()

    def _flush(self):
        current, self.current = self.current, None
        if current is None or not current.forwarded:
            return
        for hook in current.hooks:
            hook.remove()
        for layer in self.layers:
            layer.clear()
        if current.sampled is not None:
            current.tensors["sampled"] = current.sampled.to(torch.int32)
        file = f"step{current.step}_mb{current.number}_rank{self.rank}.safetensors"
        self._write(file, current.tensors)
        order = ("loss", "ce", "aux_loss", "z_loss", "returned_loss", "loss_grad", "aux_loss_grad")
        self._append({"kind": "micro_batch", "step": current.step, "micro_batch": current.number, "rank": self.rank, "file": file,
                      **{k: v for k, v in current.record.items() if k not in order}, **{k: current.record.get(k) for k in order}})
        self._describe(current)

    # -- steps

    @contextlib.contextmanager
    def micro_batch(self, **facts):
        """For a loop whose model does not get them itself: labels, shift_labels, attention_mask, num_items_in_batch."""
        self.extra = facts
        try:
            yield self
        finally:
            self.extra = {}

    def start_step(self, step):
        self._guarded(self._start_step)(step)

    def _start_step(self, step):
        self._flush()
        self._finish_step()
        self.step, self.micro_batches, self.accumulated = step, 0, {}
        if step not in self.steps:
            return self._disarm()
        self._arm()
        self._describe()

    def before_step(self, optimizer=None):
        """Call right before optimizer.step(), with the gradients that it will use."""
        self._guarded(self._before_step)(optimizer)

    def _before_step(self, optimizer):
        self._flush()
        self._finish_step()
        if self.step not in self.steps:
            return
        tensors = {}
        record = {"kind": "step", "step": self.step, "rank": self.rank, "file": f"step{self.step}_rank{self.rank}.safetensors",
                  "grad_norm": None, "micro_batches": self.micro_batches}
        if optimizer is not None and optimizer.param_groups:
            record["learning_rate"] = _number(optimizer.param_groups[0].get("lr"))
            if (scaler := getattr(optimizer, "scaler", None)) is not None:
                record["loss_scale"] = scaler.get_scale()
        if not self.sharded:
            norms = [torch.linalg.vector_norm(p.grad.detach(), dtype=torch.float32) for p in self.model.parameters()
                     if p.grad is not None and not p.grad.is_sparse]
            if norms:
                device = norms[0].device
                record["applied_grad_norm"] = torch.stack([n.to(device) for n in norms]).double().norm().item()
            for layer in self.layers:
                prefix, weight = f"layer.{layer.number}.", layer.weight()
                effective = self._effective_weight(layer, weight)
                if effective is not None:
                    tensors[prefix + "router_weight"] = _copy(effective[:layer.num_experts])
                if weight.grad is not None:
                    tensors[prefix + "router_grad"] = _copy(weight.grad[:layer.num_experts])
                elif norms and weight.requires_grad and layer.logits_dtype is not None:  # it ran, and nothing came back
                    tensors[prefix + "router_grad"] = torch.zeros(weight.shape, dtype=weight.dtype)[:layer.num_experts]
                if (norm := self._expert_norms(layer)) is not None:
                    tensors[prefix + "expert_grad_norm"] = norm
                if (counter := layer.one_per_expert(_COUNTERS)) is not None:
                    tensors[prefix + "expert_counter"] = _copy(counter.reshape(-1).round().to(torch.int64))
            record["clip_coefficient"] = self._clip_coefficient()
        self.pending = (record, tensors, {})

    def after_step(self):
        """Call right after optimizer.step(). The step is written when the next one begins, so that what the trainer
        still does to the correction bias or reports of the step belongs to it."""
        self._guarded(self._after_step)()

    def _after_step(self):
        self._flush()
        following = self.step + 1
        if self.optimizer_handles:  # a loop of one's own: steps are counted here
            self.step, self.micro_batches, self.accumulated = following, 0, {}
            if following in self.steps:
                self._arm()
        if following not in self.steps and not self.evaluation:
            self._disarm()

    def report(self, values):
        """What the trainer logged for the last step."""
        self._guarded(self._report)(values)

    def _report(self, values):
        if self.pending is not None:
            self.pending[2].update({k: v for k, v in ((k, _number(v)) for k, v in values.items()) if v is not None})
            self._finish_step()

    def _finish_step(self):
        pending, self.pending = self.pending, None
        if pending is None:
            return
        record, tensors, reported = pending
        for layer in self.layers if not self.sharded else []:
            bias = layer.correction_bias()
            if bias is not None and layer.number in self.bias_before:
                tensors[f"layer.{layer.number}.correction_bias_before"] = self.bias_before[layer.number]
                tensors[f"layer.{layer.number}.correction_bias_after"] = _copy(bias.reshape(-1))
        record["grad_norm"] = reported.get("grad_norm")
        self._write(record["file"], tensors)
        self._append({**record, "reported": reported})

    def _effective_weight(self, layer, weight):
        """The router's matrix as the forward uses it: with the adapter on it, where PEFT can say what that adds."""
        if not layer.lora():
            return weight
        for module in layer.router.modules():
            if hasattr(module, "get_delta_weight") and hasattr(module, "active_adapters") and not getattr(module, "disable_adapters", False):
                if getattr(module, "merged", False):
                    return weight
                delta = sum(module.get_delta_weight(a) for a in module.active_adapters if a in module.lora_A)
                return weight + delta.to(weight.dtype) if isinstance(delta, torch.Tensor) and delta.shape == weight.shape else None
        return None

    def _expert_norms(self, layer):
        """L2 norm of each expert's gradient: one module an expert, stacks [E, ...], or PEFT's adapters on a stack."""
        count, squares, seen = layer.experts, torch.zeros(layer.num_experts, dtype=torch.float64), False
        if count != layer.num_experts:
            return None
        for i, expert in enumerate(_expert_list(layer.block, count) or []):
            for p in expert.parameters():
                seen = seen or p.requires_grad
                if p.grad is not None:
                    squares[i] += torch.linalg.vector_norm(p.grad, dtype=torch.float32).double().cpu() ** 2
        for name, p in [] if _expert_list(layer.block, count) else _expert_stacks(layer.block, layer.router, count):
            seen = seen or p.requires_grad
            if p.grad is not None:
                # lora_A [r * E, in] has the expert as the slow index, lora_B [out, r * E] as the fast one.
                stack = p.grad.reshape(-1, count).t() if "lora_B" in name else p.grad.reshape(count, -1)
                squares += torch.linalg.vector_norm(stack, dim=1, dtype=torch.float32).double().cpu() ** 2
        return squares.sqrt() if seen else None

    def _clip_coefficient(self):
        """Gradient that the optimizer gets over the one that accumulated: below 1 where it was clipped."""
        if self.world_size > 1 or self.training.get("mixed_precision") == "fp16":
            return None  # averaged over ranks, or unscaled, between the two
        best = None
        for i, probe in enumerate(self.probes):
            before, now = self.accumulated.get(i), probe.grad
            if before is not None and now is not None and before.shape == now.shape:
                size = float(before.double().pow(2).sum())
                if size > 0 and (best is None or size > best[0]):
                    best = (size, float((before.double() * now.double()).sum()) / size)
        return best[1] if best else None

    # -- files

    def _open(self):
        if self.opened:
            return
        self.opened = True
        os.makedirs(self.dir, exist_ok=True)
        self.records = "records.jsonl" if self.rank == 0 else f"records_rank{self.rank}.jsonl"
        for name in os.listdir(self.dir):  # an older trace in this folder is replaced
            rank = re.fullmatch(r"(?:step\d+(?:_mb\d+)?|records)_rank(\d+)\.(?:safetensors|jsonl)", name)
            stale = name == "records.jsonl" and self.rank == 0
            if stale or rank and (int(rank.group(1)) == self.rank or self.rank == 0 and int(rank.group(1)) >= self.world_size):
                os.remove(os.path.join(self.dir, name))

    def _write(self, name, tensors):
        self._open()
        path = os.path.join(self.dir, name)
        save_file(tensors, path + ".part")  # named by its rank
        os.replace(path + ".part", path)

    def _append(self, record):
        self._open()
        with open(os.path.join(self.dir, self.records), "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")
            f.flush()

    def _describe(self, current=None):
        """trace.json: at the start, and again once a forward has shown what the model's files do not say."""
        if self.rank != 0 and os.environ.get("LOCAL_RANK") != "0":  # one a node: nodes may not share the folder
            return
        self._open()
        config = _config_dict(self.model)
        config.pop("_name_or_path", None)
        if current is not None and "model_accepts_loss_kwargs" not in self.training and current.record["training"]:
            if current.call.get("num_items_in_batch") is not None and not self.extra:
                self.training["model_accepts_loss_kwargs"] = True
        asked = self.output_router_logits
        coefficient = getattr(self._inner(), "router_aux_loss_coef", None)
        first = self.layers[0]
        checkpointing = getattr(self._inner(), "is_gradient_checkpointing", None)
        static = {
            "format": "moe-audit-trace", "version": 1, "recorder": {"name": "moe_audit_recorder.py", "version": VERSION},
            "packages": _packages(),
            "model": {"model_type": config.get("model_type"), "class": type(self._inner()).__name__,
                      "hidden_size": first.hidden_size, "num_experts": first.num_experts, "top_k": first.top_k, "config": config},
            "training": {"framework": "torch", "world_size": self.world_size, "gradient_checkpointing": checkpointing, **self.training},
            "coefficients": {"router_aux_loss_coef": _number(coefficient) if coefficient is not None else _deep(
                                 config, "router_aux_loss_coef", "aux_loss_coef", "aux_loss_alpha", "moe_loss_weight"),
                             "router_z_loss_coef": _deep(config, "router_z_loss_coef"), "bias_update_rate": None},
            "output_router_logits": asked if asked is not None else _deep(config, "output_router_logits"),
            "layers": [self._layer_facts(layer) for layer in self.layers],
        }
        if hasattr(self.model, "peft_config"):
            keys = ("peft_type", "r", "lora_alpha", "target_modules", "target_parameters", "exclude_modules", "modules_to_save", "rank_pattern")
            static["adapters"] = {name: {k: sorted(v) if isinstance(v, (set, list)) else v for k in keys if (v := getattr(c, k, None)) is not None}
                                  for name, c in self.model.peft_config.items()}
        text = json.dumps(static, indent=1, default=str) + "\n"
        if text != self.static:
            self.static = text
            path = os.path.join(self.dir, "trace.json")
            part = f"{path}.{self.rank}.part"
            with open(part, "w", encoding="utf-8") as f:
                f.write(text)
            os.replace(part, path)

    def _inner(self):
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def _layer_facts(self, layer):
        weight = layer.weight()
        name = _WRAPPERS.sub("", re.sub(r"^(base_model\.model\.)+", "", layer.name))
        inner = next((m for _, m in layer.router.named_modules() if m.__class__.__module__.split(".")[0] != "peft"), layer.router)
        return {"layer": layer.number, "module": name, "class": type(inner).__name__, "num_experts": layer.num_experts,
                "top_k": layer.top_k, "weight_dtype": str(weight.dtype).removeprefix("torch."), "logits_dtype": layer.logits_dtype,
                "trainable": any(p.requires_grad for p in layer.router.parameters()), "lora": layer.lora(),
                "experts_trainable": any(p.requires_grad for p in self._expert_parameters(layer))}

    @staticmethod
    def _expert_parameters(layer):
        experts = _expert_list(layer.block, layer.experts)
        if experts:
            return [p for e in experts for p in e.parameters()]
        return [p for _, p in _expert_stacks(layer.block, layer.router, layer.experts)]


def _packages():
    """Versions of what this process has imported, and of nothing that merely lies beside it."""
    names = {"torch": "torch", "transformers": "transformers", "peft": "peft", "trl": "trl", "accelerate": "accelerate",
             "safetensors": "safetensors", "deepspeed": "deepspeed", "bitsandbytes": "bitsandbytes", "axolotl": "axolotl",
             "unsloth": "unsloth", "llamafactory": "llamafactory", "swift": "ms-swift"}
    found = {}
    for module, package in names.items():
        if module in sys.modules:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[package] = importlib.metadata.version(package)
    return found


# --- the Trainer's callback -------------------------------------------------------------------------------------------

def _training_facts(args):
    plain = {"gradient_accumulation_steps": args.gradient_accumulation_steps, "micro_batch_size": args.per_device_train_batch_size,
             "world_size": args.world_size, "max_grad_norm": args.max_grad_norm, "gradient_checkpointing": args.gradient_checkpointing,
             "mixed_precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "no",
             "average_tokens_across_devices": getattr(args, "average_tokens_across_devices", None)}
    home = type(args).__module__.split(".")[0]
    return {"framework": home if home != "__main__" else "transformers", "arguments_class": type(args).__name__, **plain}


def _callback_class():
    from transformers import TrainerCallback

    class MoeAuditCallback(TrainerCallback):
        """Records `steps` (global steps, from 0) of a Trainer into trace_dir. Options as Recorder's."""

        def __init__(self, trace_dir, steps=(0, 1), max_tokens=None, **options):
            self.recorder, self.options = None, dict(trace_dir=trace_dir, steps=list(steps), max_tokens=max_tokens, **options)

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            why = ("the hooks would break the graphs of torch_compile" if getattr(args, "torch_compile", False) else
                   "DataParallel runs copies of the model" if getattr(args, "n_gpu", 1) > 1 else None)
            if why:
                warnings.warn(f"moe_audit_recorder: {why}: nothing is recorded", RuntimeWarning, stacklevel=2)
                return
            self.recorder = Recorder(model, training=_training_facts(args), **self.options)

        def on_step_begin(self, args, state, control, **kwargs):
            if self.recorder:
                self.recorder.start_step(state.global_step)

        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            if self.recorder:
                self.recorder.before_step(optimizer)

        def on_step_end(self, args, state, control, **kwargs):
            if self.recorder:
                self.recorder.after_step()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if self.recorder and logs:
                self.recorder.report(logs)

        def on_train_end(self, args, state, control, **kwargs):
            if self.recorder:
                self.recorder.close()

    return MoeAuditCallback


def __getattr__(name):  # transformers is imported only for who asks for the callback
    if name != "MoeAuditCallback":
        raise AttributeError(name)
    globals()[name] = _callback_class()
    return globals()[name]
