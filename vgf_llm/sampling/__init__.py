"""Old home of :mod:`vgf_llm.engines`, kept for one release; see the modules here."""
