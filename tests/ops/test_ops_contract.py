"""What holds for every op: registration, torch.compile, dtypes, strides, gradients made once, errors that name."""

import ast
import contextlib
import io
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hiper_fast import bench, ops
from hiper_fast.ops import _head, _library

SIZE = bench.Size(3, 7, 40, 9, 14, 30)
LAYERS = ("rms_norm", "swiglu", "rope")
LOSSES = ("linear_logprobs", "ppo_loss", "value_loss", "linear_ppo", *LAYERS)


@pytest.fixture(scope="module")
def x():
    return bench.make_inputs(SIZE)


def raw_calls(x, softcap=None):
    """Raw op -> its arguments."""
    detached = {k: v.detach() for k, v in vars(x).items() if isinstance(v, torch.Tensor)}
    hidden, weight, logprobs, entropy = (
        detached[k] for k in ("hidden", "weight", "logprobs", "entropy")
    )
    bias = torch.randn(len(weight))
    ppo = (0.2, 0.2, 3.0, 0.01, 0.001)
    return {
        "hae": (
            x.rewards, x.values_low, x.values_high, None, x.switch, x.terminated, x.cu_turns, None, None, 1.0, 1.0, 0.9,
        ),
        "gae": (x.rewards, x.values_low, x.terminated, x.cu_turns, None, 1.0, 0.9),
        "normalize": (x.rewards, x.switch, 1e-8),
        "find_roles": (x.token_ids, x.cu_tokens, x.pieces.bytes, x.pieces.offsets, x.pieces.flags),
        "scatter_advantages": (*x.levels[:5:2], x.levels.boundary, x.roles, x.cu_tokens),
        "normalize_and_scatter": (*x.levels[:5:2], x.levels.boundary, x.roles, x.cu_tokens, 1e-8),
        "linear_logprobs": (hidden, weight, bias, x.targets, 0.7, softcap, True),
        "linear_logprobs_backward": (
            torch.randn(SIZE.rows), torch.randn(SIZE.rows), hidden, weight, None, x.targets, 0.7, softcap,
            True, True, False,
        ),
        "ppo_loss": (logprobs, x.old_logprobs, x.advantages, x.loss_mask, None, entropy, *ppo, None, True),
        "value_loss": (x.values.detach(), x.values_low, x.rewards, x.switch, 0.5, 3.0, True),
        "linear_ppo": (
            hidden, weight, None, x.targets, x.row_old, x.row_advantages, x.row_ref, 1.0, softcap, *ppo, None,
            True, True, False,
        ),
        "paged_attention": (
            x.asked, x.key_pool, x.value_pool, x.blocks, x.cu_query, x.lengths, None, 7, softcap, torch.zeros(2),
        ),
        "sample": (x.logits, x.uniform, x.temperature),
        "rms_norm": (hidden, detached["scale"], 1e-6),
        "rms_norm_backward": (torch.randn_like(hidden), hidden, detached["scale"], 1e-6, True, True),
        "swiglu": (detached["gate"], detached["up"]),
        "swiglu_backward": (detached["up"], detached["gate"], detached["up"], True, True),
        "rope": (detached["query"], detached["key"], x.cos, x.sin, False),
    }  # fmt: skip


HEADS = ["linear_logprobs", "linear_logprobs_backward", "linear_ppo"]


@pytest.mark.parametrize(
    "op, softcap",
    [(op, None) for op in [
        "hae", "gae", "normalize", "find_roles", "scatter_advantages", "normalize_and_scatter", "ppo_loss",
        "value_loss", "paged_attention", "sample", *HEADS, *LAYERS, "rms_norm_backward", "swiglu_backward",
    ]] + [(op, 2.0) for op in HEADS],
)  # fmt: skip
def test_opcheck(x, op, softcap):
    torch.library.opcheck(getattr(torch.ops.hiper_fast, op).default, raw_calls(x, softcap)[op])


@pytest.mark.parametrize("op", ops.implementations())
def test_compiles_in_one_graph(x, op):
    """Forward; the losses' gradients come from the compiled backward."""
    call = bench.make_calls(x)[op]
    if op in LOSSES:

        def loss():
            given = {
                "linear_logprobs": lambda: sum(
                    ops.linear_logprobs(x.hidden, x.weight, x.targets, softcap=cap)
                    for cap in (None, 2.0)
                ),
                "ppo_loss": lambda: ops.ppo_loss(
                    x.logprobs, x.old_logprobs, x.advantages, x.loss_mask
                )[0],
                "value_loss": lambda: ops.value_loss(x.values, x.values_low, x.rewards, x.switch)[
                    0
                ],
                "linear_ppo": lambda: sum(
                    ops.linear_ppo(
                        x.hidden, x.weight, x.targets, x.row_old, x.row_advantages, softcap=cap
                    )[0]
                    for cap in (None, 2.0)
                ),
                "rms_norm": lambda: ops.rms_norm(x.hidden, x.scale).square(),
                "swiglu": lambda: ops.swiglu(x.gate, x.up).square(),
                "rope": lambda: torch.cat(ops.rope(x.query, x.key, x.cos, x.sin), 1).square(),
            }
            return 2 * given[op]().sum()

        leaves = {
            "ppo_loss": (x.logprobs,),
            "value_loss": (x.values,),
            "rms_norm": (x.hidden, x.scale),
            "swiglu": (x.gate, x.up),
            "rope": (x.query, x.key),
        }.get(op, (x.hidden, x.weight))
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        result, expected = (torch.autograd.grad(f(), leaves) for f in (compiled, loss))
    else:
        compiled = torch.compile(lambda: call(ops), fullgraph=True, backend="aot_eager")
        result, expected = compiled(), call(ops)
    torch.testing.assert_close(result, expected)


seen = []


def log(self, function, types, args=(), kwargs=None):
    seen.append(str(function))
    return function(*args, **kwargs or {})


class DispatchLog(TorchDispatchMode):
    __torch_dispatch__ = log


class FunctionLog(TorchFunctionMode):
    __torch_function__ = log


@pytest.mark.parametrize("mode", [DispatchLog, FunctionLog])
@pytest.mark.parametrize("op", ops.implementations())
def test_modes_see_every_op(x, op, mode):
    expected = bench.make_calls(x)[op](ops)
    seen.clear()
    with mode():
        result = bench.make_calls(x)[op](ops)
    assert f"hiper_fast.{op}.default" in seen
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize("op", ops.implementations())
def test_the_profiler_sees_every_op(x, op):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        bench.make_calls(x)[op](ops)
    assert f"hiper_fast::{op}" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("op", [op for op in ops.implementations() if op not in LOSSES])
def test_fake_tensors_need_no_memory(x, op):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = SimpleNamespace(
            **{k: mode.from_tensor(v) if torch.is_tensor(v) else v for k, v in vars(x).items()}
        )
        fake.levels = ops.HAE(*map(mode.from_tensor, x.levels))
        result = bench.make_calls(fake)[op](ops)
    assert_alike(result, bench.make_calls(x)[op](ops))


def test_losses_of_fake_tensors(x):
    for arguments, run in (
        ((x.logprobs, x.old_logprobs, x.advantages, x.loss_mask), lambda *a: ops.ppo_loss(*a)[0]),
        ((x.values, x.values_low, x.rewards, x.switch), lambda *a: ops.value_loss(*a)[0]),
        ((x.hidden, x.weight, x.targets), ops.linear_logprobs),
        (
            (x.hidden, x.weight, x.targets, x.row_old, x.row_advantages),
            lambda *a: ops.linear_ppo(*a)[0],
        ),
        ((x.hidden, x.scale), ops.rms_norm),
        ((x.gate, x.up), ops.swiglu),
        ((x.query, x.key, x.cos, x.sin), ops.rope),
    ):
        with FakeTensorMode() as mode:
            result = run(*map(mode.from_tensor, arguments))
        assert_alike(result, run(*arguments))


def assert_alike(fakes, real):
    for a, b in zip(*([r] if torch.is_tensor(r) else r for r in (fakes, real)), strict=True):
        assert isinstance(a, FakeTensor) and (a.shape, a.dtype, a.requires_grad) == (
            b.shape,
            b.dtype,
            b.requires_grad,
        )


class Sub(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        seen.append(str(function))
        return super().__torch_function__(function, types, args, kwargs)


def test_subclasses_have_their_say(x):
    values, mask = x.rewards.as_subclass(Sub), x.switch
    seen.clear()
    result = ops.normalize(values, mask)
    assert type(result) is Sub and "hiper_fast.normalize.default" in seen
    torch.testing.assert_close(result.as_subclass(torch.Tensor), ops.normalize(x.rewards, mask))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_transforms_go_where_they_did(x):
    values, mask = torch.stack([x.rewards, x.values_low]), torch.stack([x.switch, ~x.switch])
    one_by_one = torch.stack([ops.normalize(v, m) for v, m in zip(values, mask, strict=True)])
    assert torch.equal(torch.vmap(ops.normalize)(values, mask), one_by_one)
    gradient = torch.func.grad(lambda v: (v * ops.normalize(v, x.switch)).sum())(x.rewards)
    assert torch.equal(gradient, ops.normalize(x.rewards, x.switch))
    for trace in (make_fx, lambda f: lambda v: torch.jit.trace(f, (v,))):
        traced = trace(lambda v: ops.normalize(v, x.switch))(x.values_low)
        assert torch.equal(traced(x.rewards), ops.normalize(x.rewards, x.switch))


def test_a_sign_kept_apart_from_the_memory_counts(x):
    flipped = torch._neg_view(x.rewards)
    assert flipped.is_neg() and torch.equal(
        ops.normalize(flipped, x.switch), -ops.normalize(x.rewards, x.switch)
    )
    nothing = ops.normalize(torch._efficientzerotensor(len(x.switch)), x.switch)
    assert torch.equal(nothing, torch.zeros(len(x.switch)))


def test_parameters_inference_and_results_as_any_tensor(x):
    assert torch.equal(
        ops.normalize(torch.nn.Parameter(x.rewards), x.switch), ops.normalize(x.rewards, x.switch)
    )
    with torch.inference_mode():
        assert all(t.is_inference() for t in ops.find_roles(x.token_ids, x.cu_tokens, x.pieces))
    result = ops.normalize(x.rewards, x.switch)
    array, copy = result.numpy(), result.clone()
    assert torch.equal(pickle.loads(pickle.dumps(result)), copy)
    result.requires_grad_().square().sum().backward()
    torch.testing.assert_close(result.grad, 2 * copy)
    del result
    assert array.tolist() == copy.tolist()  # the memory lives as long as its last user


@pytest.mark.parametrize("op", ops.implementations())
def test_results_are_saved_and_loaded_as_weights_only(x, op):
    result = bench.make_calls(x)[op](ops)
    plain = result._asdict() if isinstance(result, ops.HAE) else result
    torch.save(plain, saved := io.BytesIO())
    saved.seek(0)
    loaded = torch.load(saved, weights_only=True)
    torch.testing.assert_close(loaded, plain, rtol=0, atol=0)
    if isinstance(result, ops.HAE):
        assert ops.HAE(**loaded)._fields == result._fields
    copy = pickle.loads(pickle.dumps(result))
    assert type(copy) is type(result)


def test_token_pieces_are_pickled(x):
    copy = pickle.loads(pickle.dumps(x.pieces))
    assert list(copy) == list(x.pieces)
    for mine, others in zip(
        ops.find_roles(x.token_ids, x.cu_tokens, copy),
        ops.find_roles(x.token_ids, x.cu_tokens, x.pieces),
        strict=True,
    ):
        assert torch.equal(mine, others)


def torch_names(source):
    """What a file imports from torch or reads of it, as dotted names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("torch"))
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("torch"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch."):
            yield ast.unparse(node)


def test_ops_use_public_torch_alone():
    """A name with a leading underscore may be gone, or mean something else, in the next version of torch."""

    def private(source):
        return [name for name in torch_names(source) if "._" in name]

    assert private("from torch import _C") and private("from torch._C import (\n_autograd,\n)")
    assert private("import torch._C") and private("if torch._C._get_tracing_state(): pass")
    sources = list(Path(ops.__file__).parent.glob("*.py"))
    assert len(sources) > 10
    for source in sources:
        assert not private(source.read_text()), source.name


def test_every_call_is_checked(x, monkeypatch):
    """On tensors that the kernel reads as they are too."""

    def refuse(*_):
        raise ValueError("checked")

    monkeypatch.setattr(sys.modules["hiper_fast.ops.normalize"], "check_vector", refuse)
    with pytest.raises(ValueError, match="checked"):
        ops.normalize(x.rewards, x.switch)


WRONG = {
    "values": {"values": torch.zeros(3, 1)},
    "mask": {"mask": torch.tensor([True, False])},
    "old_values": {"old_values": torch.zeros(3, dtype=torch.float64)},
}


@pytest.mark.parametrize("name", ["values", "old_values", "mask"])
@pytest.mark.parametrize("where", ["here", "fake", "compiled"])
def test_errors_name_the_argument(name, where):
    given = {"values": torch.zeros(3), "old_values": torch.zeros(3), "returns": torch.zeros(3)}
    given |= {"mask": torch.tensor([True, True, False])} | WRONG[name]
    run = torch.compile(ops.value_loss, backend="eager") if where == "compiled" else ops.value_loss
    with (
        FakeTensorMode(allow_non_fake_inputs=True)
        if where == "fake"
        else contextlib.nullcontext() as mode
    ):
        if mode is not None:
            given = {key: mode.from_tensor(tensor) for key, tensor in given.items()}
        with pytest.raises(ValueError, match=f"^{name} must"):
            run(**given)


@pytest.mark.skipif(_library.extension is None, reason="needs the extension")
@pytest.mark.parametrize(
    "change, error, told",
    [
        (
            lambda values, mask: (values, mask[:-1]),
            ValueError,
            "21 elements to go with the others, got 20",
        ),
        (lambda values, mask: (values.long(), mask), TypeError, "contiguous CPU vector of float32"),
        (lambda values, mask: (values, mask.float()), TypeError, "contiguous CPU vector of bool"),
        (lambda values, mask: (values[None], mask), TypeError, "contiguous CPU vector of float32"),
    ],
    ids=["length", "dtype", "mask's dtype", "dimensions"],
)
def test_a_raw_op_refuses_what_its_kernel_cannot_read(x, change, error, told):
    with pytest.raises(error, match=told):
        torch.ops.hiper_fast.normalize(*change(x.rewards, x.switch), 1e-8)


@pytest.mark.skipif(_library.extension is None, reason="needs the extension")
def test_a_raw_op_refuses_a_prefix_sum_without_elements(x):
    nothing = torch.zeros(0, dtype=torch.int32)
    with pytest.raises(ValueError, match="leading 0"):
        torch.ops.hiper_fast.gae(x.rewards, x.values_low, x.terminated, nothing, None, 1.0, 1.0)


def cast(tensors, dtype):
    return [t.detach().to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_what_its_values_give_in_float32(x, dtype):
    options = dict(gamma=0.9, lambda_turn=0.8)
    turns = (x.rewards, x.values_low, x.values_high, x.switch, x.terminated, x.cu_turns)
    for run, arguments in {
        (lambda *a: ops.hae(*a, **options)): turns,
        ops.gae: (x.rewards, x.values_low, x.terminated, x.cu_turns),
        ops.normalize: (x.rewards, x.switch),
        (lambda low, high, switch: ops.scatter_advantages(
            ops.HAE(low, None, high, None, switch, None, x.levels.boundary), x.roles, x.cu_tokens
        )): x.levels[:5:2],
        (lambda *a: ops.ppo_loss(*a)[0]): (x.logprobs, x.old_logprobs, x.advantages, x.loss_mask),
        (lambda *a: ops.value_loss(*a)[0]): (x.values, x.values_low, x.rewards, x.switch),
        ops.linear_logprobs: (x.hidden, x.weight, x.targets),
    }.items():  # fmt: skip
        half = cast(arguments, dtype)
        result, expected = run(*half), run(*cast(half, torch.float32))
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_have_the_dtype_of_their_input(x, dtype):
    logprobs, values, hidden, weight = (
        t.detach().to(dtype).requires_grad_() for t in (x.logprobs, x.values, x.hidden, x.weight)
    )
    old, advantages, values_old, returns = cast(
        (x.old_logprobs, x.advantages, x.values_low, x.rewards), dtype
    )
    for loss, leaves in (
        (ops.ppo_loss(logprobs, old, advantages, x.loss_mask)[0], (logprobs,)),
        (ops.value_loss(values, values_old, returns, x.switch)[0], (values,)),
        (
            ops.linear_ppo(hidden, weight, x.targets, x.row_old, x.row_advantages)[0],
            (hidden, weight),
        ),
    ):
        assert loss.dtype == torch.float32
        for gradient in torch.autograd.grad(loss, leaves):
            assert gradient.dtype == dtype and gradient.abs().sum() > 0


def losses(x):
    yield (
        ops.linear_ppo(x.hidden, x.weight, x.targets, x.row_old, x.row_advantages)[0],
        (x.hidden, x.weight),
    )
    yield ops.ppo_loss(x.logprobs, x.old_logprobs, x.advantages, x.loss_mask)[0], (x.logprobs,)
    yield ops.value_loss(x.values, x.values_low, x.rewards, x.switch)[0], (x.values,)
    yield ops.linear_logprobs(x.hidden, x.weight, x.targets).sum(), (x.hidden, x.weight)


def test_autocast_changes_nothing(x):
    def results():
        for loss, leaves in losses(x):
            yield loss, *torch.autograd.grad(loss, leaves)
        for op in HEADS:  # in plain torch
            plain = sys.modules[f"hiper_fast.ops.{op.removesuffix('_backward')}"]
            run = plain._run_torch_backward if op.endswith("backward") else plain._run_torch
            with torch.no_grad():
                yield run(*raw_calls(x)[op]), run(*raw_calls(x, 2.0)[op])

    torch.manual_seed(0)  # raw_calls draws some of its arguments
    outside = list(results())
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = list(results())
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


def test_gradients_are_scaled_and_can_be_taken_again(x):
    for loss, leaves in losses(x):
        once = torch.autograd.grad(loss, leaves, retain_graph=True)
        again = torch.autograd.grad(loss, leaves, retain_graph=True)
        thrice = torch.autograd.grad(3 * loss, leaves)
        for a, b, c in zip(once, again, thrice, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(3 * a, c)


def test_double_backward_is_refused(x):
    for loss, leaves in losses(x):
        gradient = torch.autograd.grad(loss, leaves, create_graph=True)[0]
        with pytest.raises(RuntimeError, match=r"ops\.\w+ has no second derivative"):
            torch.autograd.grad(gradient.sum(), leaves)


def test_without_need_no_gradient_is_made(x, monkeypatch):
    made = []
    add = _head.Head.add_gradients
    monkeypatch.setattr(
        _head.Head, "add_gradients", lambda self, *a: made.append(self) or add(self, *a)
    )
    arguments = x.targets, x.row_old, x.row_advantages
    with torch.no_grad():
        assert not ops.linear_ppo(x.hidden, x.weight, *arguments)[0].requires_grad
    ops.linear_ppo(x.hidden.detach(), x.weight.detach(), *arguments)
    assert not made
    ops.linear_ppo(x.hidden, x.weight.detach(), *arguments)
    assert made and made[0].grad_weight is None and made[0].grad_hidden is not None


def test_a_denominator_as_number_or_tensor(x):
    for run, leaf in (
        (
            lambda d: ops.linear_ppo(
                x.hidden, x.weight, x.targets, x.row_old, x.row_advantages, denominator=d
            ),
            x.hidden,
        ),
        (
            lambda d: ops.ppo_loss(
                x.logprobs, x.old_logprobs, x.advantages, x.loss_mask, denominator=d
            ),
            x.logprobs,
        ),
        (
            lambda d: ops.value_loss(x.values, x.values_low, x.rewards, x.switch, denominator=d),
            x.values,
        ),
    ):
        (number, its), (tensor, others) = run(7.0), run(torch.tensor(7))
        torch.testing.assert_close(number, tensor)
        torch.testing.assert_close(its, others)
        torch.testing.assert_close(
            torch.autograd.grad(number, leaf), torch.autograd.grad(tensor, leaf)
        )


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [1, 300, 2**27], ids=["row by row", "some rows", "at once"])
def test_linear_ppo_equals_its_two_ops_in_everything(x, chunk, softcap, monkeypatch):
    monkeypatch.setitem(_head.CHUNK_BYTES, "cpu", chunk)
    bias = torch.randn(SIZE.vocabulary, requires_grad=True)
    leaves = x.hidden, x.weight, bias
    of_head = {"temperature": 0.8, "bias": bias, "softcap": softcap}
    options = {
        "clip_high": 0.3,
        "dual_clip": 2.0,
        "kl_coef": 0.4,
        "entropy_coef": 0.2,
        "denominator": 5.0,
    }
    loss, metrics = ops.linear_ppo(
        x.hidden, x.weight, x.targets, x.row_old, 2 * x.row_advantages, ref_logprobs=x.row_ref,
        **of_head, **options,
    )  # fmt: skip
    logprobs, entropy = ops.linear_logprobs(x.hidden, x.weight, x.targets, **of_head, entropy=True)
    expected, expected_metrics = ops.ppo_loss(
        logprobs, x.row_old, 2 * x.row_advantages, torch.ones_like(x.targets, dtype=torch.bool),
        ref_logprobs=x.row_ref, entropy=entropy, **options,
    )  # fmt: skip
    expected_metrics["logprobs"] = logprobs.detach()
    assert list(metrics) == list(expected_metrics)
    assert not any(value.requires_grad for value in metrics.values())
    torch.testing.assert_close((loss, metrics), (expected, expected_metrics))
    for a, b in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [300, 2**27], ids=["some rows", "at once"])
def test_linear_ppo_in_plain_torch_gives_the_kernels_results(x, chunk, softcap, monkeypatch):
    monkeypatch.setitem(_head.CHUNK_BYTES, "cpu", chunk)
    given = raw_calls(x, softcap)["linear_ppo"]
    with torch.no_grad():
        plain = sys.modules["hiper_fast.ops.linear_ppo"]._run_torch(*given)
    torch.testing.assert_close(plain, torch.ops.hiper_fast.linear_ppo.default(*given))


def test_strided_inputs(x):
    def spread(t):
        return torch.stack([t.detach(), t.detach()], -1)[..., 0]

    old, advantages, ref = map(spread, (x.row_old, x.row_advantages, x.row_ref))
    hidden, weight = (spread(t).requires_grad_() for t in (x.hidden, x.weight))
    loss = ops.linear_ppo(hidden, weight, spread(x.targets), old, advantages, ref_logprobs=ref)[0]
    expected = ops.linear_ppo(
        x.hidden, x.weight, x.targets, x.row_old, x.row_advantages, ref_logprobs=x.row_ref
    )[0]
    torch.testing.assert_close(loss, expected)
    for a, b in zip(
        torch.autograd.grad(loss, (hidden, weight)),
        torch.autograd.grad(expected, (x.hidden, x.weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    tokens = [spread(t) for t in (x.logprobs, x.old_logprobs, x.advantages, x.loss_mask)]
    torch.testing.assert_close(
        ops.ppo_loss(*tokens)[0],
        ops.ppo_loss(x.logprobs, x.old_logprobs, x.advantages, x.loss_mask)[0].detach(),
    )


@pytest.mark.parametrize(
    "name, change",
    [
        ("hidden", {"hidden": [[0.0]]}),
        ("weight", {"weight": torch.zeros(5, 3)}),
        ("targets", {"targets": torch.tensor([0, 1, 5])}),
        ("targets", {"targets": torch.tensor([0, -1, 1])}),
        ("targets", {"targets": torch.tensor([0.0, 1.0, 1.0])}),
        ("old_logprobs", {"old_logprobs": torch.zeros(2)}),
        ("advantages", {"advantages": torch.zeros(3, dtype=torch.float64)}),
        ("ref_logprobs", {"ref_logprobs": torch.zeros(3, device="meta")}),
        ("bias", {"bias": torch.zeros(4)}),
        ("temperature", {"temperature": -1.0}),
        ("softcap", {"softcap": 0.0}),
    ],
)
def test_linear_ppo_names_what_is_wrong(name, change):
    given = {
        "hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "targets": torch.tensor([0, 1, 2]),
        "old_logprobs": torch.zeros(3), "advantages": torch.zeros(3),
    }  # fmt: skip
    with pytest.raises(ValueError, match=name):
        ops.linear_ppo(**(given | change))
