"""Ask the built-in model about a picture drawn on the spot: python examples/quickstart.py"""

from PIL import Image, ImageDraw

from opsin import LLM, SamplingParams


def main() -> None:
    picture = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(picture).ellipse((16, 40, 60, 84), fill="red")
    ImageDraw.Draw(picture).rectangle((80, 20, 116, 56), fill="blue")
    ask = ["How many shapes are there?", "What color is the circle?", "What is to the right of the circle?"]

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
        print(f"{question:<36} {output.outputs[0].text.strip()}")


if __name__ == "__main__":
    main()
