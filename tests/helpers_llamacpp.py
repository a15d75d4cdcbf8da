"""llama.cpp and transformers as clients, ourselves as one, and how llama.cpp rounds activations."""

import ctypes
import functools
import os
import pathlib
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import gguf  # noqa: E402
import llama_cpp  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402

import formats  # noqa: E402
from formats.gguf import gguf_name  # noqa: E402
from formats.gguf_blocks import in_our_order, rotary_heads  # noqa: E402
from formats.groups import layers_in_groups  # noqa: E402
from llama import LINEARS, generate, linears  # noqa: E402
from quant import Quantized, dequantize, unpack  # noqa: E402

NEW_TOKENS = 60
RESULTS = {  # what llama.cpp calls the result of each layer
    "q_proj": "Qcur",
    "k_proj": "Kcur",
    "v_proj": "Vcur",
    "o_proj": "attn_out",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_out",
}


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


class LlamaCpp:
    """llama.cpp with a file loaded."""

    def __init__(self, file):
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = False  # AMX crashed on a Xeon, on llama.cpp's own files too

        def default_params():
            return params

        llama_cpp.llama_cpp.llama_model_default_params = default_params
        self.model = llama_cpp.Llama(
            str(file),
            n_ctx=512,
            logits_all=True,
            n_threads=2,
            verbose=False,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
        )

    def results(self, tokens):
        """{name: result [T, O]} of all that is computed for the logits; the first of a name."""
        ggml, found = llama_cpp.llama_cpp._lib, {}  # which loads libggml, too
        ggml.ggml_get_name.restype, ggml.ggml_nbytes.restype = ctypes.c_char_p, ctypes.c_size_t

        @llama_cpp.ggml_backend_sched_eval_callback
        def watch(address, before, _):
            tensor = ctypes.c_void_p(address)
            name = ggml.ggml_get_name(tensor).decode()
            if not before and name not in found:
                found[name] = torch.empty(ggml.ggml_nbytes(tensor) // 4)
                to = ctypes.c_void_p(found[name].data_ptr())
                size = ctypes.c_size_t(4 * len(found[name]))
                ggml.ggml_backend_tensor_get(tensor, to, ctypes.c_size_t(0), size)
            return True

        self.model.context_params.cb_eval = watch
        self.model._ctx = llama_cpp._internals.LlamaContext(
            model=self.model._model, params=self.model.context_params, verbose=False
        )
        self.logits(tokens)
        T = len(tokens)
        return {name: values.view(T, -1) for name, values in found.items() if len(values) % T == 0}

    def tokenize(self, text):
        return self.model.tokenize(text.encode(), add_bos=False, special=False)

    def logits(self, tokens):  # [T, V]
        self.model.reset()
        self.model.eval(tokens)
        return torch.from_numpy(self.model.scores[: len(tokens)].copy())

    def greedy(self, tokens, eos):
        said = [self.logits(tokens)[-1].argmax().item()]
        while len(said) < NEW_TOKENS and said[-1] != eos:
            self.model.eval(said[-1:])
            said.append(int(self.model.scores[self.model.n_tokens - 1].argmax()))
        return said


class Transformers:
    """transformers with a file loaded, which it dequantizes."""

    def __init__(self, file):
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(file.parent, gguf_file=file.name, dtype=torch.float32)

    @torch.no_grad()
    def logits(self, tokens):
        return self.model(torch.tensor([tokens])).logits[0]

    def greedy(self, tokens, eos):
        said = self.model.generate(
            torch.tensor([tokens]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=eos,
        )
        return said[0, len(tokens) :].tolist()


class Ours:
    """The folder that was exported."""

    def __init__(self, folder):
        self.model = formats.load_model(folder).float()

    @torch.no_grad()
    def logits(self, tokens):
        return self.model(torch.tensor([tokens]))[0]

    def greedy(self, tokens, eos):
        said = generate(self.model, torch.tensor([tokens]), NEW_TOKENS, eos_token_ids=[eos])
        return said[0, len(tokens) :].tolist()


class AsInFile(Ours):
    """The same in the numbers of the file: all but codes may have fewer bits there."""

    def __init__(self, folder, file):
        super().__init__(folder)
        tensors = {t.name: t for t in gguf.GGUFReader(file).tensors}
        for name, p in self.model.named_parameters():
            t = tensors[gguf_name(name)]
            rows = torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy())
            p.data = in_our_order(rows, rotary_heads(name, self.model.config))
        for name, layer in layers_in_groups(self.model).items():
            if tensors[gguf_name(f"{name}.weight")].tensor_type.name == "Q4_1":
                layer.scale, layer.offset = layer.scale.half(), layer.offset.half().float()
        self.head_type = tensors["output.weight"].tensor_type.name

    def rounding(self, tokens, theirs=None):
        """(logits, relative errors) with activations rounded as llama.cpp rounds them on a CPU.

        theirs: its `results`. Then each layer starts from those of the layers before it, and has
        two errors, one with exact activations and one with rounded ones.
        """
        layers, errors = linears(self.model, (*LINEARS, "lm_head")), []

        def replace(name, layer, inputs, exact):
            compute = self.head if name == "lm_head" else q4_1_layer
            rounded = compute(layer, inputs[0])
            if theirs is None:
                return rounded
            expected = self.expected(name, theirs)
            pair = relative_error(exact[0], expected), relative_error(rounded[0], expected)
            errors.append(pair)
            return expected[None]

        hooks = []
        for name, layer in layers:
            hooks.append(layer.register_forward_hook(functools.partial(replace, name)))
        logits = self.logits(tokens)
        for hook in hooks:
            hook.remove()
        return logits, errors

    def expected(self, name, theirs):
        """The result of the layer `name` among llama.cpp's, in our order of rows."""
        if name == "lm_head":
            return theirs["result_output"]
        _, _, i, module = name.split(".", 3)
        y = theirs[f"{RESULTS[module.split('.')[1]]}-{i}"]
        heads = rotary_heads(name, self.model.config)
        return y.unflatten(1, (heads, -1, 2)).transpose(2, 3).flatten(1) if heads else y

    def head(self, layer, x):
        """The output head: in float16 or, for Q6_K, in blocks of 256 activations of 8 bits."""
        if self.head_type == "F16":
            return F.linear(x.half().float(), layer.weight)
        codes, d = eight_bits(x, 256)
        return F.linear((codes * d).flatten(-2), layer.weight)


def eight_bits(x, size):
    """Activations in blocks: their codes from -127 to 127, [..., I / size, size], and scales."""
    blocks = x.unflatten(-1, (-1, size))
    d = blocks.abs().amax(-1, keepdim=True) / 127
    return (blocks / d).round().nan_to_num(), d


def q4_1_layer(layer, x):
    """A layer with groups of 32 as llama.cpp's Q4_1 times Q8_1: scales and sums are float16."""
    codes, d = eight_bits(x, 32)
    sums = (codes.sum(-1, keepdim=True) * d).half().float()
    in_file = unpack(layer.packed, 4, layer.in_features)
    w = dequantize(Quantized(in_file, layer.scale, torch.zeros_like(layer.offset)))
    x = (codes * d.half().float()).flatten(-2)
    return F.linear(x, w) + F.linear(sums.squeeze(-1), layer.offset)
