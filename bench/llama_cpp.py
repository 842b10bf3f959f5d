#!/usr/bin/env python3
"""llama.cpp beside herd: converts a Llama4ForCausalLM checkpoint to GGUF, and times llama_decode on it.

    llama_cpp.py convert MODEL_DIR OUT.gguf
    llama_cpp.py logits  OUT.gguf [--threads T]
    llama_cpp.py time    OUT.gguf [--threads T] [--prompt 512] [--decode 128]

`logits` and `time` print one JSON object per line. Token ids are fed directly, so the GGUF holds no tokenizer.
"""

import argparse
import json
import math
import mmap
import os
import pathlib
import sys
import time

# With active waiting two threads on a busy machine spend their time slices in spin barriers.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np

SPECIAL_TOKENS = 64  # the last ids of the vocabulary; prompts avoid them
PROMPT_TOKENS = 41  # of the parity prompt


def token(index, vocab, salt=13):
    """A fixed scattered sequence of ordinary token ids; the parity prompt is its first 41 with the default salt."""
    return (index * 7919 + salt) % (vocab - SPECIAL_TOKENS)


# ---------------------------------------------------------------- conversion


class Checkpoint:
    """Tensors of a safetensors checkpoint as raw 16-bit words: numpy has no bf16, and nothing here needs its values."""

    def __init__(self, folder):
        self.tensors = {}
        for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
            with open(path, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            header_bytes = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + header_bytes])
            header.pop("__metadata__", None)
            for name, entry in header.items():
                name = name.removeprefix("language_model.")
                self.tensors[name] = (data, 8 + header_bytes + entry["data_offsets"][0], entry)

    def words(self, name):
        data, start, entry = self.tensors[name]
        if entry["dtype"] != "BF16":
            raise SystemExit(f"{name} is {entry['dtype']}; only BF16 checkpoints are converted")
        count = math.prod(entry["shape"])
        return np.frombuffer(data, dtype=np.uint16, count=count, offset=start).reshape(entry["shape"])

    def floats(self, name):
        return (self.words(name).astype(np.uint32) << 16).view(np.float32)


def text_config(folder):
    config = json.loads((pathlib.Path(folder) / "config.json").read_text())
    config = config.get("text_config", config)
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    # llama.cpp has these as constants of the architecture, so another value would time another function.
    fixed = {"floor_scale": 8192, "attn_scale": 0.1, "attention_chunk_size": 8192}
    for key, value in fixed.items():
        if config[key] != value:
            raise SystemExit(f"llama.cpp computes llama4 with {key} = {value}; this checkpoint says {config[key]}")
    if config.get("use_qk_norm") != (config["num_local_experts"] != 128):
        raise SystemExit("llama.cpp normalises queries and keys exactly when there are not 128 experts")
    return config, theta


def write_header(writer, config, theta):
    writer.add_name("mini-maverick")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size_mlp"])
    writer.add_expert_feed_forward_length(config["intermediate_size"])
    writer.add_interleave_moe_layer_step(config["interleave_moe_layer_step"])
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("none")


def write_layer(add, checkpoint, config, layer):
    source, target = f"model.layers.{layer}.", f"blk.{layer}."
    add(target + "attn_norm.weight", checkpoint.floats(source + "input_layernorm.weight"))
    add(target + "ffn_norm.weight", checkpoint.floats(source + "post_attention_layernorm.weight"))
    for ours, theirs in {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}.items():
        add(f"{target}{theirs}.weight", checkpoint.words(f"{source}self_attn.{ours}_proj.weight"))
    ffn = source + "feed_forward."
    if ffn + "router.weight" not in checkpoint.tensors:
        for part in ("gate", "up", "down"):
            add(f"{target}ffn_{part}.weight", checkpoint.words(f"{ffn}{part}_proj.weight"))
        return
    add(target + "ffn_gate_inp.weight", checkpoint.floats(ffn + "router.weight"))
    for part in ("gate", "up", "down"):
        add(f"{target}ffn_{part}_shexp.weight", checkpoint.words(f"{ffn}shared_expert.{part}_proj.weight"))
    # Published layout: [E, in, out] with gate and up side by side; GGUF: one tensor each, [E, out, in].
    gate_up = checkpoint.words(ffn + "experts.gate_up_proj")
    inner = gate_up.shape[2] // 2
    for part, tensor in (
        ("gate", gate_up[:, :, :inner]),
        ("up", gate_up[:, :, inner:]),
        ("down", checkpoint.words(ffn + "experts.down_proj")),
    ):
        add(f"{target}ffn_{part}_exps.weight", np.ascontiguousarray(tensor.transpose(0, 2, 1)))


def convert(folder, output):
    import gguf

    config, theta = text_config(folder)
    checkpoint = Checkpoint(folder)
    partial = str(output) + ".partial"
    writer = gguf.GGUFWriter(partial, "llama4", use_temp_file=True)
    write_header(writer, config, theta)

    def add(name, array):
        if array.dtype == np.float32:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array).view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)

    add("token_embd.weight", checkpoint.words("model.embed_tokens.weight"))
    add("output_norm.weight", checkpoint.floats("model.norm.weight"))
    add("output.weight", checkpoint.words("lm_head.weight"))
    for layer in range(config["num_hidden_layers"]):
        write_layer(add, checkpoint, config, layer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, output)


# ------------------------------------------------------------------- running


class Engine:
    """One llama.cpp context: rows of (token, position, sequence) in, logits out."""

    def __init__(self, path, threads, sequences, tokens_max):
        # This file has the package's name, and its own folder comes first on the path.
        sys.path[:] = [entry for entry in sys.path if pathlib.Path(entry).resolve() != pathlib.Path(__file__).resolve().parent]
        import llama_cpp

        self.api = api = llama_cpp
        api.llama_backend_init()
        model_params = api.llama_model_default_params()
        self.model = api.llama_model_load_from_file(str(path).encode(), model_params)
        if not self.model:
            raise SystemExit(f"llama.cpp could not load {path}")
        params = api.llama_context_default_params()
        params.n_ctx = tokens_max * sequences
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = sequences > 1
        self.context = api.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit("llama.cpp could not make a context")
        self.vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        self.batch = api.llama_batch_init(512, 0, 1)

    def decode(self, rows, wanted):
        """`rows` are (token, position, sequence); logits are computed for the row indices in `wanted`."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token_id, position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i] = token_id, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = i in wanted
        status = self.api.llama_decode(self.context, batch)
        if status != 0:
            raise SystemExit(f"llama_decode failed with {status}")

    def logits(self, row):
        pointer = self.api.llama_get_logits_ith(self.context, row)
        return np.ctypeslib.as_array(pointer, shape=(self.vocab,)).copy()

    def clear(self):
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)

    def close(self):
        self.api.llama_batch_free(self.batch)
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)


def emit(**fields):
    print(json.dumps(fields), flush=True)


def prompt_logits(path, threads):
    engine = Engine(path, threads, 1, 512)
    ids = [token(i, engine.vocab) for i in range(PROMPT_TOKENS)]
    engine.decode([(id_, i, 0) for i, id_ in enumerate(ids)], {PROMPT_TOKENS - 1})
    logits = engine.logits(PROMPT_TOKENS - 1)
    top = np.argsort(-logits)[:5]
    emit(engine="llama.cpp", case="logits", prompt=ids, top=[[int(i), float(logits[i])] for i in top])
    engine.close()


def time_prefill(engine, tokens):
    rows = [(token(i, engine.vocab), i, 0) for i in range(tokens)]
    for warm in (True, False):
        engine.clear()
        start = time.perf_counter()
        for at in range(0, tokens, 512):
            part = rows[at : at + 512]
            engine.decode(part, {len(part) - 1} if at + 512 >= tokens else set())
        engine.logits(len(part) - 1)
        seconds = time.perf_counter() - start
        if not warm:
            return seconds


def time_decode(engine, streams, steps):
    """Seconds for `steps` steps of `streams` sequences that each hold 16 tokens already."""
    engine.clear()
    context = 16
    for stream in range(streams):
        engine.decode([(token(i, engine.vocab, 13 + 101 * stream), i, stream) for i in range(context)], {context - 1})
    last = set(range(streams))

    def step(number):
        ids = (token(number, engine.vocab, 29 + 1009 * stream) for stream in range(streams))
        engine.decode([(id_, context + number, stream) for stream, id_ in enumerate(ids)], last)
        for row in range(streams):
            engine.logits(row)

    warm_steps = 2
    for number in range(warm_steps):
        step(number)
    start = time.perf_counter()
    for number in range(warm_steps, warm_steps + steps):
        step(number)
    return time.perf_counter() - start


def run_times(path, threads, prompt, decode):
    def report(case, streams, tokens, seconds):
        emit(engine="llama.cpp", case=case, threads=threads, streams=streams, tokens=tokens, seconds=round(seconds, 6),
             tokens_per_s=round(tokens / seconds, 3))

    engine = Engine(path, threads, 1, max(prompt, decode + 64))
    report("prefill", 1, prompt, time_prefill(engine, prompt))
    report("decode", 1, decode, time_decode(engine, 1, decode))
    engine.close()
    for streams in (8, 32):
        engine = Engine(path, threads, streams, 128)
        steps = max(decode // streams, 8)
        report(f"decode-{streams}", streams, steps * streams, time_decode(engine, streams, steps))
        engine.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("convert")
    command.add_argument("model")
    command.add_argument("output")
    for name in ("logits", "time"):
        command = commands.add_parser(name)
        command.add_argument("gguf")
        command.add_argument("--threads", type=int, default=2)
        if name == "time":
            command.add_argument("--prompt", type=int, default=512)
            command.add_argument("--decode", type=int, default=128)
    args = parser.parse_args()
    if args.command == "convert":
        convert(args.model, args.output)
    elif args.command == "logits":
        prompt_logits(args.gguf, args.threads)
    else:
        run_times(args.gguf, args.threads, args.prompt, args.decode)


if __name__ == "__main__":
    main()
