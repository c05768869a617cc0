"""InternVL3 in Hugging Face layout: square tiles of a picture, and the whole as one more; frames of videos."""
