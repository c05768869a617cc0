"""Ask the built-in model about a picture drawn on the spot: python examples/quickstart.py"""

from PIL import Image, ImageDraw

from opsin import LLM, SamplingParams


def main() -> None:
    picture = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(picture).ellipse((32, 32, 96, 96), fill="red")
    ask = ["What is in the picture?", "What color is the circle?", "How many shapes are there?"]

    with LLM(model="demo") as llm:
        conversations = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image_pil", "image_pil": picture}, {"type": "text", "text": question}],
                }
            ]
            for question in ask
        ]
        outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=32))
    for question, output in zip(ask, outputs, strict=True):
        print(f"{question:<28} {output.outputs[0].text.strip()}")


if __name__ == "__main__":
    main()
