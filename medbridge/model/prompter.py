"""What a vision-language model's prompts are made with: processor, tokenizer and configuration, without its weights.

Rollout engines that hold the weights in another process need no more than this. What the model itself makes of a
prompt stands in `policy`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, AutoProcessor, GenerationConfig

from medbridge.data.images import ImageCache
from medbridge.data.items import Item, Permutation
from medbridge.data.prompts import PromptSettings, build_prompt
from medbridge.errors import MedbridgeError


class Prompter:
    """Renders prompts of one model and reads its completions.

    Attributes:
        path: folder or id of the model.
        processor, tokenizer: of transformers.
        banned: tokens that must never be sampled: the placeholders of images and videos.
        stop_ids: tokens that end a completion, the end of turn first.
        vocab_size: size of the output layer.
        context: the longest sequence that the model takes, in tokens.
    """

    def __init__(self, processor: Any, config: Any, generation: Any, *, path: str) -> None:
        """From a model's parts; `generation` is its generation configuration or None.

        Raises:
            MedbridgeError: a tokenizer, chat template or end-of-sequence token is missing.
        """
        if not hasattr(processor, "tokenizer"):
            raise MedbridgeError(f"model {path!r}: its processor has no tokenizer; give a vision-language model.")
        if processor.tokenizer.chat_template is None and getattr(processor, "chat_template", None) is None:
            raise MedbridgeError(f"model {path!r} has no chat template; give an instruction-tuned model.")
        self.path = path
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token_id = _first_set(config, "image_token_id", "image_token_index")
        video = _first_set(config, "video_token_id", "video_token_index")
        self.banned = [token for token in (self.image_token_id, video) if token is not None]
        self.stop_ids = self._stop_ids(getattr(generation, "eos_token_id", None))
        text_config = config.get_text_config()
        self.vocab_size = int(text_config.vocab_size)
        self.context = int(getattr(text_config, "max_position_embeddings", 1 << 30))

    @classmethod
    def load(cls, path: str) -> Prompter:
        """Of any Hugging Face image-text-to-text model, a folder or an id.

        Raises:
            MedbridgeError: where its files cannot be read.
        """
        try:
            processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise MedbridgeError(
                f"model {path!r}: its processor can't be loaded: {error}\n"
                "Give a folder or id of an image-text-to-text model that transformers knows (model.path)."
            ) from error
        try:
            generation = GenerationConfig.from_pretrained(path)
        except OSError:
            generation = None  # a model need not have one
        return cls(processor, config, generation, path=path)

    def render(self, item: Item, order: Permutation, settings: PromptSettings) -> str:
        """The prompt's text by the model's chat template, with one placeholder for each image."""
        messages = build_prompt(item, order, settings)
        return str(self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def prompt_ids(self, item: Item, order: Permutation, settings: PromptSettings) -> list[int]:
        """Token ids of the prompt as `render` gives it: its images are not expanded."""
        return self._tokenize(self.render(item, order, settings))

    def length(self, item: Item, order: Permutation, settings: PromptSettings, images: ImageCache) -> int:
        """Tokens of the prompt with its images expanded, without processing their pixels.

        Raises:
            MedbridgeError: an image that cannot be read.
        """
        text = self.render(item, order, settings)
        whole = getattr(self.processor, "full_image_sequence", None)
        if whole is not None:  # Gemma 3: every image takes the same tokens, with line breaks around them
            return len(self._tokenize(text.replace(self.processor.boi_token, whole)))
        count = len(self._tokenize(text))
        if not item.images:
            return count
        sizes = [(image.height, image.width) for image in map(images.get, item.images)]
        expanded = self.processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
        return count + sum(expanded) - len(sizes)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a completion without its closing special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def completion_ids(self, text: str) -> list[int]:
        """Token ids of a supervised completion, closed by the end-of-turn token."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, self.stop_ids[0]]

    def _tokenize(self, text: str) -> list[int]:
        plain = {"add_special_tokens": False} if self._starts_with_bos(text) else {}
        return list(self.tokenizer(text, **plain)["input_ids"])

    def _starts_with_bos(self, text: str) -> bool:
        bos = self.tokenizer.bos_token
        return bool(bos) and text.startswith(bos)

    def _stop_ids(self, generation_eos: int | list[int] | None) -> list[int]:
        """End-of-turn first, then every other token after which the model has nothing to say."""
        ids: list[int | None] = []
        for token in ("<|im_end|>", "<end_of_turn>", "<|eot_id|>"):
            found = self.tokenizer.convert_tokens_to_ids(token)
            if found is not None and found != self.tokenizer.unk_token_id:
                ids.append(int(found))
        for value in (self.tokenizer.eos_token_id, generation_eos):
            ids.extend(value if isinstance(value, list) else [value])
        unique = list(dict.fromkeys(int(token) for token in ids if token is not None))
        if not unique:
            raise MedbridgeError(f"model {self.path!r}: its tokenizer names no end-of-sequence token.")
        return unique


def _first_set(config: Any, *names: str) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return int(value)
    return None
