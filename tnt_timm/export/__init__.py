"""Export models: folder.py writes the folder that timm and the Hugging Face hub read, formats.py the other formats."""
