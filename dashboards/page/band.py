"""How sure a front is, on the report's page: the words beside the chart, whose data the band is."""

from __future__ import annotations

from html import escape

from streamllm.results.study import StudyResults

from ..attainment import Band, band
from ..drawing.style import NoDataError


def band_or_reason(study: StudyResults) -> Band | str:
    """How sure the front is; why that is not known, or nothing for one that was not confirmed."""
    try:
        return band(study)
    except NoDataError as reason:
        return f"How sure the front is cannot be drawn: {reason}." if study.is_confirmed else ""


def band_note(sure: Band | str) -> str:
    """HTML."""
    if isinstance(sure, str):
        return sure and f'<p class="legend">{escape(sure)}</p>'
    key = '<span><i class="band-key"></i> nine of ten drawn fronts; dashed: what half of them attain.</span>'
    return f'<p class="legend">{key} {escape(sure.words)}</p>'
