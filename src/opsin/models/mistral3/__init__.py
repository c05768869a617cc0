"""Mistral 3 and Pixtral: pictures at their own resolution, a token after each row of features."""
