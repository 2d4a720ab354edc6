"""Damaged checkpoints: each mutation changes a copy on disk at random, and says what it did.

What cannot be told from a sound checkpoint is not among them: other codes, other scales of a possible size.
"""

import json
import re
import struct

import torch
from safetensors.torch import load_file, save_file

MUTATIONS = {}
UNUSED = r"^mtp\.|\.[kv]_scale$"
MARKER = "remote-code-was-run"


def mutation(function):
    MUTATIONS[function.__name__] = function
    return function


class Checkpoint:
    """The files of one checkpoint, to be read and written back."""

    def __init__(self, folder, rng):
        self.folder, self.rng = folder, rng

    @property
    def shards(self):
        return sorted(self.folder.glob("*.safetensors"))

    def some_shard(self):
        return self.rng.choice(self.shards)

    def json(self, name):
        return json.loads((self.folder / name).read_text())

    def write_json(self, name, content):
        (self.folder / name).write_text(json.dumps(content))

    def some_tensor(self, *endings):
        """``(shard, name)`` of a tensor of the model proper whose name has one of the endings, () for any."""
        names = [(shard, name) for shard in self.shards for name in load_file(shard) if not re.search(UNUSED, name)]
        return self.rng.choice([(shard, name) for shard, name in names if name.endswith(endings or ("",))])

    def edit(self, shard, change):
        tensors = load_file(shard)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, shard, metadata={"format": "pt"})

    def edit_index(self, change):
        index = self.json("model.safetensors.index.json")
        said = change(index)
        self.write_json("model.safetensors.index.json", index)
        return said

    def edit_config(self, change):
        config = self.json("config.json")
        said = change(config)
        self.write_json("config.json", config)
        return said


@mutation
def truncated_shard(c):
    shard = c.some_shard()
    content = shard.read_bytes()
    keep = c.rng.randrange(len(content))
    shard.write_bytes(content[:keep])
    return f"{shard.name} cut to {keep} bytes"


@mutation
def damaged_header(c):
    shard = c.some_shard()
    content = bytearray(shard.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    at = c.rng.randrange(8 + length)
    content[at] ^= 1 << c.rng.randrange(8)
    shard.write_bytes(content)
    return f"{shard.name} byte {at}"


@mutation
def garbage_json(c):
    file = c.rng.choice([*sorted(c.folder.glob("*config.json")), c.folder / "model.safetensors.index.json"])
    text = file.read_text()
    file.write_text(c.rng.choice([text[: c.rng.randrange(len(text))], "[]", "null", '"text"', "", "[" * 100_000]))
    return file.name


@mutation
def missing_file(c):
    file = c.rng.choice([*c.shards, c.folder / "model.safetensors.index.json", c.folder / "config.json"])
    file.unlink()
    return file.name


@mutation
def index_of_another_form(c):
    return c.edit_index(
        lambda index: c.rng.choice(
            [
                lambda: index.pop("weight_map"),
                lambda: index.update(weight_map=None),
                lambda: index.update(weight_map={}),
                lambda: index["weight_map"].update({"lm_head.weight": 7}),
            ]
        )()
    )


@mutation
def index_leading_elsewhere(c):
    def change(index):
        name = c.rng.choice(sorted(index["weight_map"]))
        elsewhere = ["../outside.safetensors", "/etc/passwd", "absent.safetensors", "..", ""]
        index["weight_map"][name] = c.rng.choice([*elsewhere, *[shard.name for shard in c.shards]])
        return f"{name} -> {index['weight_map'][name]}"

    return c.edit_index(change)


@mutation
def index_with_another_tensor(c):
    def change(index):
        name = c.rng.choice(sorted(index["weight_map"]))
        file = index["weight_map"].pop(name)
        if c.rng.random() < 0.5:
            index["weight_map"][name + "_"] = file
        return name

    return c.edit_index(change)


@mutation
def tensor_in_two_shards(c):
    shard, name = c.some_tensor()
    tensor = load_file(shard)[name]
    other = c.rng.choice([each for each in c.shards if each != shard])
    c.edit(other, lambda tensors: tensors.update({name: tensor}))
    return f"{name} in {shard.name} and {other.name}"


@mutation
def missing_tensor(c):
    shard, name = c.some_tensor()
    c.edit(shard, lambda tensors: tensors.pop(name))
    return name


@mutation
def renamed_tensor(c):
    shard, name = c.some_tensor()
    owner = name.rpartition(".")[0]
    new = c.rng.choice([f"{name}_inv", f"{owner}.weight_scale_inv", f"{owner}.scale", f"x{name}", name.upper()])
    c.edit(shard, lambda tensors: tensors.update({new: tensors.pop(name)}))
    return f"{name} -> {new}"


@mutation
def extra_tensor(c):
    shard, name = c.some_tensor("weight", "weight_packed")
    owner = name.rpartition(".")[0]
    extras = ["pre_quant_scale", "weight_zero_point", "svdquant_lora_a", "weight_scale_3", "bias"]
    there = {name for each in c.shards for name in load_file(each)}
    new = c.rng.choice([each for extra in extras if (each := f"{owner}.{extra}") not in there])
    c.edit(shard, lambda tensors: tensors.update({new: torch.full((tensors[name].shape[0],), 2.0)}))
    return new


@mutation
def other_dtype(c):
    shard, name = c.some_tensor()
    dtype = c.rng.choice([torch.uint8, torch.int8, torch.float8_e5m2, torch.float64, torch.int32, torch.bool])
    c.edit(shard, lambda tensors: tensors.update({name: tensors[name].float().to(dtype)}))
    return f"{name} as {dtype}"


@mutation
def other_bits(c):
    shard, name = c.some_tensor("weight_scale", "weight", "weight_packed")
    dtype = c.rng.choice([torch.uint8, torch.int8, torch.float8_e5m2])
    c.edit(shard, lambda tensors: tensors.update({name: torch.atleast_1d(tensors[name]).view(dtype)}))
    return f"{name} viewed as {dtype}"


@mutation
def other_shape(c):
    shard, name = c.some_tensor()

    def change(tensors):
        tensor = tensors[name]
        dim = c.rng.randrange(max(1, tensor.ndim))
        ways = [lambda: tensor[None], lambda: tensor.reshape(-1), lambda: tensor.expand(2, *tensor.shape)]
        if tensor.ndim:
            ways += [lambda: tensor.narrow(dim, 0, tensor.shape[dim] - 1), lambda: torch.cat((tensor, tensor), dim)]
        if tensor.ndim == 2:
            ways += [lambda: tensor.t(), lambda: tensor[:, : tensor.shape[1] // 2], lambda: tensor[:, :-1]]
        tensors[name] = c.rng.choice(ways)()
        return f"{name} {list(tensor.shape)} -> {list(tensors[name].shape)}"

    said = []
    c.edit(shard, lambda tensors: said.append(change(tensors)))
    return said[0]


@mutation
def swizzled_scales(c):
    """In tiles of 128 rows and 4 scales, padded, as Blackwell's kernels want them."""
    shard, name = c.some_tensor("in_proj.weight_scale", "up_proj.weight_scale", "down_proj.weight_scale")

    def change(tensors):
        if tensors[name].ndim != 2:  # of an FP8 layer
            tensors[name] = torch.zeros(128, 4).to(torch.float8_e4m3fn)
            return
        scale = tensors[name].view(torch.uint8)
        rows, columns = (-(-scale.shape[0] // 128) * 128, -(-scale.shape[1] // 4) * 4)
        padded = torch.zeros(rows, columns, dtype=torch.uint8)
        padded[: scale.shape[0], : scale.shape[1]] = scale
        tiles = padded.view(rows // 128, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4)
        swizzled = tiles.reshape(rows, columns) if c.rng.random() < 0.5 else tiles.reshape(-1)
        tensors[name] = swizzled.view(torch.float8_e4m3fn)

    c.edit(shard, change)
    return name


@mutation
def impossible_scale(c):
    shard, name = c.some_tensor("weight_scale_2", "weight_global_scale")
    value = c.rng.choice([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, "negative", "inverted"])

    def change(tensors):
        scale = tensors[name]
        wrong = {"negative": -scale, "inverted": 1 / scale}.get(value)
        tensors[name] = torch.full_like(scale, value) if wrong is None else wrong

    c.edit(shard, change)
    return f"{name} {value}"


@mutation
def nan_among_block_scales(c):
    shard, name = c.some_tensor("weight_scale")

    def change(tensors):
        scale = tensors[name]
        if scale.dtype != torch.float8_e4m3fn:
            tensors[name] = torch.full_like(scale, torch.nan)
            return
        flat = scale.view(torch.uint8).reshape(-1)
        flat[c.rng.randrange(flat.numel())] = c.rng.choice([0x7F, 0xFF])

    c.edit(shard, change)
    return name


@mutation
def names_of_another_producer(c):
    """One module's or every module's tensors under the other producer's names, values as they were."""
    factors = ("weight_scale_2", "weight_global_scale")
    names = {"weight": "weight_packed", "input_scale": "input_global_scale", factors[0]: factors[1]}
    names |= {theirs: ours for ours, theirs in names.items()}
    _, chosen = c.some_tensor(*factors)
    owner, everywhere = chosen.rpartition(".")[0], c.rng.random() < 0.5

    def change(tensors):
        packed = {name.rpartition(".")[0] for name in tensors if name.endswith(factors)}
        for name in list(tensors):
            module, _, last = name.rpartition(".")
            if last in names and (module in packed if everywhere else module == owner):
                tensors[f"{module}.{names[last]}"] = tensors.pop(name)

    for shard in c.shards:
        c.edit(shard, change)
    return "everywhere" if everywhere else owner


@mutation
def another_quantization(c):
    def change(config):
        facts = config["quantization_config"]
        layer = "backbone.layers.1.mixer.shared_experts.up_proj"
        changes = [
            {"quant_algo": c.rng.choice(["NVFP4_SVD", "W4A8_NVFP4_FP8", "MXFP8", "FP8", "INT4", 7, ["NVFP4"], {}])},
            {"group_size": 32},
            {"quant_method": c.rng.choice(["compressed-tensors", "modelopt"])},
            {"config_groups": c.rng.choice([{"group_0": {"targets": ["Linear"]}}, [], 3, {"group_0": None}])},
            {"ignore": c.rng.choice(["lm_head", [7], [layer], {"a": 1}])},
            {"quantized_layers": c.rng.choice([{layer: {"quant_algo": "FP8"}}, {layer: 3}, ["lm_head"], {"x": {}}])},
            {"format": "pack-quantized"},
        ]
        change = c.rng.choice(changes)
        # A wish that the other producer's reader does not know changes nothing, which is right as well.
        facts.update(change)
        if "quantized_layers" in change and facts.get("quant_method") == "modelopt":
            facts["quant_algo"] = "MIXED_PRECISION"
        return str(change)

    return c.edit_config(change)


@mutation
def another_model(c):
    def change(config):
        name = c.rng.choice(
            ["hidden_size", "n_routed_experts", "moe_intermediate_size", "num_attention_heads", "vocab_size",
             "mamba_num_heads", "num_key_value_heads", "head_dim", "moe_shared_expert_intermediate_size", "n_groups"]
        )  # fmt: skip
        config[name] = c.rng.choice([0, -1, 1, config[name] + 16, config[name] * 2, config[name] // 2, "80", None, 2.5])
        return f"{name} {config[name]}"

    return c.edit_config(change)


@mutation
def another_pattern(c):
    def change(config):
        pattern = config["hybrid_override_pattern"]
        config["hybrid_override_pattern"] = c.rng.choice(["", "X", pattern + "M", pattern[:-1], pattern[::-1], 5])
        return config["hybrid_override_pattern"]

    return c.edit_config(change)


@mutation
def another_generation_config(c):
    """What generate() is told; the weights do not need it."""
    wrong = ["none such", 7, -1, None, [1], {"a": 1}]
    names = ["cache_implementation", "compile_config", "watermarking_config", "eos_token_id", "max_length"]
    name, value = c.rng.choice(names), c.rng.choice(wrong)
    c.write_json("generation_config.json", c.json("generation_config.json") | {name: value})
    return f"{name} {value}"


@mutation
def remote_code(c):
    """Code that would leave a file behind if anything ran it."""
    marker = c.folder / MARKER
    code = f"open({str(marker)!r}, 'w').close()\n"
    for module in ("configuration_nemotron_h", "modeling_nemotron_h", "setup", "__init__", "sitecustomize"):
        (c.folder / f"{module}.py").write_text(code)

    def change(config):
        config["auto_map"] = {
            "AutoConfig": "configuration_nemotron_h.NemotronHConfig",
            "AutoModelForCausalLM": "modeling_nemotron_h.NemotronHForCausalLM",
        }
        if c.rng.random() < 0.5:
            config["model_type"] = "remote_nemotron"
        return config["model_type"]

    return c.edit_config(change)
