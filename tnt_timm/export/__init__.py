"""Models for the world outside: folder.py is a model as timm and the Hugging Face hub keep it, formats.py the other formats."""
