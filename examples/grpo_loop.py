"""GRPO in one plain loop: sample, reward, loss, step. Reads from top to bottom.

    python examples/grpo_loop.py                                  # a small model made from nothing, a minute on a CPU
    python examples/grpo_loop.py --model Qwen/Qwen2.5-VL-3B-Instruct --data FOLDER --learning-rate 1e-6

It simplifies: one device, one update for each batch of samples (so the old policy is the current one), no checkpoints.
Needs transformers, and medbridge for the small model and the questions.
"""

import argparse
import random
from pathlib import Path

import embedded  # before transformers: it makes torchvision importable beside a CPU build of torch
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from medbridge_kernels import LossConfig, linear_grpo_loss

PROMPTS, COMPLETIONS, TOKENS = 4, 8, 12  # prompts a step, completions a prompt, tokens at most in each

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", help="Hugging Face id or folder; default: a small one made from nothing")
parser.add_argument("--data", help="folder of questions as JSON lines; default: slices of an average brain")
parser.add_argument("--work", type=Path, default=Path("runs/grpo_loop"), help="where model and data are put")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--learning-rate", type=float, default=1e-3)
options = parser.parse_args()

random.seed(0)
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
rows = embedded.questions(options.work, options.data)
name = options.model or embedded.model_from_nothing(options.work, rows)
processor = AutoProcessor.from_pretrained(name)
model = AutoModelForImageTextToText.from_pretrained(name, dtype=torch.float32).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.0)
config = LossConfig.preset("dapo")
banned = [model.config.image_token_id]  # an image token in a completion would ask for an image
group_offsets = torch.arange(0, PROMPTS * COMPLETIONS + 1, COMPLETIONS, device=device)

for step in range(1, options.steps + 1):
    # Sample from the policy as it is, whatever the model's generation settings. The group of a prompt lies together.
    asked = [row for row in random.sample(rows, PROMPTS) for _ in range(COMPLETIONS)]
    batch = processor(
        text=[processor.apply_chat_template(embedded.chat(row), add_generation_prompt=True) for row in asked],
        images=[[embedded.picture(row)] for row in asked], padding=True, padding_side="left", return_tensors="pt",
    ).to(device)  # fmt: skip
    sequences = model.generate(
        **batch, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0, suppress_tokens=banned,
        max_new_tokens=TOKENS,
    )  # fmt: skip
    completions = sequences[:, batch["input_ids"].shape[1] :]
    is_end = completions == processor.tokenizer.eos_token_id
    mask = is_end.cumsum(1) - is_end.long() == 0  # up to the end token, and with it
    texts = [processor.decode(ids[kept], skip_special_tokens=True) for ids, kept in zip(completions, mask, strict=True)]
    rewards = torch.tensor([embedded.likeness(text, row["target"]) for text, row in zip(texts, asked, strict=True)])

    # Hidden states of the completion tokens, packed. Logits are never stored whole.
    length = completions.shape[1]
    batch["input_ids"], batch["attention_mask"] = sequences, torch.cat([batch["attention_mask"], mask.long()], dim=1)
    if "mm_token_type_ids" in batch:
        batch["mm_token_type_ids"] = torch.nn.functional.pad(batch["mm_token_type_ids"], (0, length))
    states = model.base_model(**batch, use_cache=False).last_hidden_state[:, -length - 1 : -1]
    loss, outputs = linear_grpo_loss(
        states[mask], model.lm_head.weight, completions[mask], sequence_ids=mask.nonzero()[:, 0], config=config,
        rewards=rewards.to(device), group_offsets=group_offsets, banned_ids=torch.tensor(banned, device=device),
    )  # fmt: skip
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(
        f"step {step}: reward {rewards.mean():.3f}, loss {loss:+.4f}, entropy {outputs.entropy.mean():.2f}", flush=True
    )
