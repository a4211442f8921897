"""A product of WebShop, for the tests of its files and of its pages."""


def product(asin="B000000001", **changes):
    """As WebShop's file of items has it."""
    return {
        "asin": asin,
        "name": "Oak Desk Lamp",
        "category": "garden",
        "query": " Desk Lamps ",
        "product_category": "Home › Lighting › Lamps",
        "full_description": "A lamp of oak.",
        "small_description": ["Dimmable ", "", "Warm light"],
        "customization_options": {
            "Color": [{"value": "Light Blue"}, {"value": "Red/White "}],
            "Size": None,
        },
        "pricing": "$18.50",
    } | changes


def asked(*attributes, instruction="Find me desk lamps"):
    """Its entry in WebShop's file of attributes and instructions."""
    return {
        "attributes": list(attributes),
        "instruction": instruction,
        "instruction_attributes": list(attributes),
    }
