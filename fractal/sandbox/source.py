def image_name() -> str:
    return "fractal-sandbox:dev"
