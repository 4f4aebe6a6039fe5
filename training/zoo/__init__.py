"""The proving ground: small video models of many families, trained on the demo's videos."""
