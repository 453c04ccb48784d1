"""A finished run scored again: from its predictions (`rescore`), or from its adapter (`evaluate`)."""
