"""The demo model: a small vision-language model that ships with the package, and the scenes it was trained on.

``model/`` is a Hugging Face folder in LLaVA's architecture. :mod:`opsin.demo.scenes` and :mod:`opsin.demo.questions`
generate its training and test data; ``python -m opsin.demo.evaluate`` measures it. Generating data needs no torch.
"""
