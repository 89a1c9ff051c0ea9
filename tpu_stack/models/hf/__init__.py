"""Hugging Face folders: config.json and safetensors, to this project's models and back.

What a family calls its tensors and settings is data in `families.py`; the decoder never learns a
family's name.

    from tpu_stack.models.hf.folder import HuggingFaceFolder
    from tpu_stack.models.hf.load import load_params
    folder = HuggingFaceFolder.open(Path("Qwen3-0.6B"))
    params = load_params(folder, profile, mesh)
"""
