"""The demo's page: where everything stands, and which step of util/demo/steps.py each control calls. Needs gradio."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from util.demo import steps
from util.demo.steps import Photo, Support
from util.errors import UserError
from util.segment.segmenter import NTRESegmenter, Segmentation, Segmenter
from util.segment.visualize import DISTRACTOR, TARGET

FONT = ("system-ui", "sans-serif")  # the visitor's own: nothing is fetched
THEME = gr.themes.Soft(primary_hue="red", neutral_hue="slate", font=FONT, font_mono=("ui-monospace", "monospace"))
RED, BLUE = f"rgb{TARGET}", f"rgb{DISTRACTOR}"
BRUSH = gr.Brush(colors=[("#{:02x}{:02x}{:02x}".format(*TARGET), 0.55)], color_mode="fixed", default_size=24)

CSS = f"""
.gradio-container {{ max-width: 1240px !important; width: 100%; margin: auto; }}
.gradio-container main {{ width: 100%; }}
.gradio-container .column {{ gap: 10px; }}
.gradio-container .prose h1 {{ margin: 0 0 4px; font-size: clamp(1.15rem, 5.5vw, 1.5rem) !important; }}
.html-container {{ padding: 0 !important; }}
.step {{ display: grid; grid-template-columns: 2.4em 1fr; align-items: center; padding: 4px 0; }}
.step b {{ width: 1.9em; height: 1.9em; line-height: 1.9em; border-radius: 50%; text-align: center; color: white;
  background: {RED}; grid-row: span 2; }}
.step h3 {{ margin: 0; }}
.drop [data-testid=status-tracker] {{ display: none; }}
.drop [data-testid=upload-text] {{ flex-direction: row; gap: 8px; font-size: 0; padding: 0; min-height: 0; }}
.drop [data-testid=upload-text]::after {{ content: "Drop here, or click to choose"; font-size: 1rem; }}
.drop .or {{ display: none; }}
.drop .icon-wrap {{ width: 22px; margin: 0; }}
.strip .grid-container {{ grid-template-columns: repeat(auto-fill, 72px) !important; padding: 0; }}
.strip .grid-wrap {{ min-height: 0; height: auto; }}
.map img {{ max-height: 420px; }}
.small-map img {{ max-height: 180px; }}
.map .icon-button-wrapper {{ display: none; }}
.caption {{ font-size: .85rem; text-align: center; }}
.legend span {{ white-space: nowrap; margin-right: 1.2em; }}
.legend i {{ display: inline-block; width: 1em; height: 1em; border-radius: 3px; vertical-align: -2px;
  margin-right: .4em; }}
.legend i.target {{ background: {RED}; }}
.legend i.distractor {{ background: {BLUE}; }}
.legend i.heat {{ width: 5em; background: linear-gradient(90deg, #440154, #31688e, #35b779, #fde725); }}
@media (max-width: 640px) {{ .gradio-container main {{ padding: 12px !important; }} }}
.small {{ font-size: .85rem; opacity: .75; }}
"""

# An editor that is given paint before it has drawn itself loses it.
EDITOR_READY = """async () => {
  const pause = (time) => new Promise((resolve) => setTimeout(resolve, time));
  while (!document.querySelector("#editor canvas")) await pause(100);
  await pause(500);
}"""

LEGEND = """<div class="legend"><span><i class="target"></i>found</span>
<span><i class="distractor"></i>distracting objects</span><span>0 <i class="heat"></i>1</span></div>"""


def build_page(segmenter: Segmenter[Any, Any], folder: Path) -> gr.Blocks:
    """The page, with the embedded example on it and its result; ``folder`` is for the masks to be downloaded."""
    network = segmenter if isinstance(segmenter, NTRESegmenter) else None
    example, example_photos = steps.example(None if network is None else network.config.data)
    example_editor = steps.editor_of(example)
    example_results, example_cost = steps.segment(segmenter, example_editor, [], example_photos)
    first = steps.view(example_photos, example_results, 0, segmenter.threshold, folder, edges=network is None)
    still = {"interactive": False, "buttons": [], "show_label": False}
    strip = {**still, "elem_classes": "strip", "fit_columns": False, "allow_preview": False}

    with gr.Blocks(
        title="NTRENet: few-shot segmentation", analytics_enabled=False, fill_width=True, delete_cache=(300, 1800)
    ) as page:
        supports, photos, results = gr.State([]), gr.State(example_photos), gr.State(example_results)
        chosen = gr.State(0)
        text(
            "<h1>Few-shot segmentation</h1>Paint one object in a photo, and the network finds its like in other"
            " photos, even of a kind it was never trained on."
        )
        with gr.Row():
            with gr.Column(scale=5, min_width=260):
                step(1, "Show the object", "Drop a photo of it and brush over all of it.")
                support_file = drop("support-file", "single")
                editor = gr.ImageEditor(
                    show_label=False,
                    sources=(),
                    transforms=(),
                    layers=False,
                    brush=BRUSH,
                    format="png",
                    canvas_size=example.mask.shape[::-1],  # a layer is laid in its middle, so it must fit exactly
                    buttons=[],
                    height=440,
                    interactive=True,
                    elem_id="editor",
                )
                add = gr.Button("Keep this one, and show another", size="sm", elem_id="add")
                with gr.Column(visible=False) as kept_column:
                    gallery = gr.Gallery(elem_id="supports", **strip)
                    with gr.Row():
                        remove = gr.Button("Remove the last", size="sm", min_width=60, elem_id="remove")
                        clear = gr.Button("Remove all", size="sm", min_width=60)
                step(2, "Choose where to look", "Drop other photos; click one to see its result.")
                photo_files = drop("photo-files", "multiple")
                photo_gallery = gr.Gallery(thumbnails(example_photos), elem_id="photos", **strip)
            with gr.Column(scale=6, min_width=260):
                step(3, "Segment", "Move the threshold: the network does not run again.")
                go = gr.Button("Segment", variant="primary", elem_id="segment")
                status = text(example_cost, elem_id="status")
                found = gr.Image(first.photo, format="jpeg", elem_id="found", elem_classes="map", **still)
                threshold = gr.Slider(
                    0.05, 0.95, segmenter.threshold, step=0.01, label="Threshold", elem_id="threshold"
                )
                edges = gr.Checkbox(network is None, label="Sharp edges (GrabCut)", elem_id="edges")
                download = gr.DownloadButton("Download the mask", first.mask_file, size="sm", elem_id="download")
                text("What the network thinks:", visible=bool(segmenter.maps))
                with gr.Row():
                    prior = small_map(first.prior, "prior: like the object", visible="prior" in segmenter.maps)
                    bg = small_map(first.bg, "background", visible="bg" in segmenter.maps)
                    distractor = small_map(
                        first.distractor, "distracting objects", visible="distractor" in segmenter.maps
                    )
                text(LEGEND, visible=bool(segmenter.maps))
        text(f'<div class="small">This is {segmenter.about}.</div>')

        # What follows says which control calls which step.
        seen = [found, prior, bg, distractor, download]
        kept = [supports, gallery, kept_column]
        looked = [photos, photo_gallery, results, chosen, status]

        def show(
            photos: list[Photo], results: list[Segmentation], chosen: int, threshold: float, sharp: bool
        ) -> list[Any]:
            return list(steps.view(photos, results, chosen, threshold, folder, edges=sharp))

        def keep(supports: list[Support]) -> list[Any]:
            return [supports, [steps.thumbnail(support) for support in supports], gr.Column(visible=bool(supports))]

        def look_in(paths: list[str]) -> Any:
            photos, complaints = steps.read_photos(paths)
            for complaint in complaints:
                gr.Warning(complaint)
            return [photos, thumbnails(photos), [], 0, "Now press Segment."] if photos else gr.skip()

        def choose(event: gr.SelectData) -> int:
            return event.index

        view_of = {
            "fn": show,
            "inputs": [photos, results, chosen, threshold, edges],
            "outputs": seen,
            "show_progress": "hidden",
        }
        ready = {"fn": lambda: gr.Button("Segment", interactive=True), "outputs": go, "queue": False}

        page.load(lambda: example_editor, None, editor, js=EDITOR_READY, show_progress="hidden")
        opened = support_file.upload(plainly(steps.open_support), support_file, editor)
        opened.then(lambda: None, None, support_file, show_progress="hidden")
        add.click(plainly(lambda *given: [*keep(steps.add_support(*given)), None]), [editor, supports], [*kept, editor])
        remove.click(lambda supports: keep(supports[:-1]), supports, kept)
        clear.click(lambda: keep([]), None, kept)
        photo_files.upload(look_in, photo_files, looked).then(**view_of).then(
            lambda: None, None, photo_files, show_progress="hidden"
        )
        photo_gallery.select(choose, None, chosen).then(**view_of)
        threshold.change(**view_of, trigger_mode="always_last")
        edges.change(**view_of, trigger_mode="always_last")
        busy = go.click(lambda: gr.Button("Segmenting ...", interactive=False), None, go, queue=False)
        done = busy.then(
            plainly(functools.partial(steps.segment, segmenter)),
            [editor, supports, photos],
            [results, status],
            show_progress_on=found,
            concurrency_limit=1,
        )
        done.success(**ready).then(**view_of)
        done.failure(**ready).then(lambda: "It failed; the terminal says why.", None, status)
    return page


def plainly(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A user's mistake is shown as its message, and everything stays as it is."""

    def shown(*values: Any) -> Any:
        try:
            return handler(*values)
        except UserError as error:
            gr.Warning(str(error))
            return gr.skip()

    return shown


def text(html: str, **settings: Any) -> gr.HTML:
    return gr.HTML(html, padding=False, **settings)


def step(number: int, title: str, sentence: str) -> None:
    text(f'<div class="step"><b>{number}</b><h3>{title}</h3><span>{sentence}</span></div>')


def drop(name: str, count: str) -> gr.File:
    """Where files are dropped. What they hold is judged here, by util/segment/pictures.py, not by the browser."""
    return gr.File(
        show_label=False, file_types=["image"], file_count=count, height=64, elem_id=name, elem_classes="drop"
    )


def small_map(picture: np.ndarray | None, caption: str, visible: bool = True) -> gr.Image:
    with gr.Column(min_width=70, visible=visible):
        image = gr.Image(
            picture, show_label=False, format="jpeg", interactive=False, buttons=[], elem_classes=["map", "small-map"]
        )
        text(f'<div class="caption">{caption}</div>')
    return image


def thumbnails(photos: list[Photo]) -> list[np.ndarray]:
    return [photo.pixels for photo in photos]
