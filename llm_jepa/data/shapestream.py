from .._moved import names_of

__getattr__ = names_of("llm_jepa.data.shapestream", "llm_jepa.synthetic.shapestream")

if __name__ == "__main__":
    __getattr__("main")()
