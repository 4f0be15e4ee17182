"""The model card of a folder: what the hub shows, and how plain transformers opens it."""

from transformers import LlavaConfig

_CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava]
---

A LLaVA made with llavaforge: a `{vision}` vision tower ({image_size} pixels, patches of {patch_size}), a projector
and a `{text}` language model, as transformers' own `LlavaForConditionalGeneration`.

```python
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is in the image?"}}]}}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=image, text=text, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=100)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

The image comes before the question, as in training.
"""


def model_card(config: LlavaConfig) -> str:
    """Return the text of `README.md`."""
    vision = config.vision_config
    return _CARD.format(
        vision=vision.model_type,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        text=config.text_config.model_type,
    )
