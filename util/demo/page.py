"""The demo's page: where everything stands, and which step of util/demo/steps.py each control calls. Needs gradio."""

import base64
import functools
import html
from collections.abc import Callable
from io import BytesIO
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
from PIL import Image, UnidentifiedImageError

from util.data.images import FORMATS, encoded
from util.demo import steps
from util.demo.steps import PAINT, Findings, Photo, Support, View
from util.errors import UserError
from util.segment.segmenter import NTRESegmenter, Segmenter
from util.segment.visualize import DISTRACTOR, TARGET

FONT = ("system-ui", "sans-serif")  # the visitor's own: nothing is fetched
THEME = gr.themes.Soft(primary_hue="red", neutral_hue="slate", font=FONT, font_mono=("ui-monospace", "monospace"))
RED, BLUE = f"rgb{TARGET}", f"rgb{DISTRACTOR}"
BRUSH = gr.Brush(colors=[("#{:02x}{:02x}{:02x}".format(*PAINT), 0.55)], color_mode="fixed", default_size=24)

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
.strip {{ display: flex; flex-wrap: wrap; gap: 8px; }}
.strip button {{ padding: 0 !important; border: 0 !important; border-radius: 8px; }}
.strip img {{ width: 72px; height: 72px; object-fit: cover; border-radius: 8px; display: block; }}
.strip button[aria-pressed=true] {{ outline: 3px solid {RED}; }}
#editor .toolbar-wrap {{ top: 4px; left: 4px; right: auto; width: auto; flex-direction: row; }}
#editor .half-container {{ flex-direction: row; padding: 0 4px; border: 0; }}
#found img {{ max-height: 420px; max-width: 100%; margin: auto; display: block; }}
.maps {{ display: flex; flex-wrap: wrap; gap: 10px; }}
.maps figure {{ flex: 1 1 70px; margin: 0; text-align: center; font-size: .85rem; }}
.maps img {{ max-height: 180px; max-width: 100%; margin: auto; display: block; }}
#download a {{ display: block; text-align: center; padding: 6px; border-radius: 8px;
  background: var(--button-secondary-background-fill); color: inherit; text-decoration: none; }}
.legend span {{ white-space: nowrap; margin-right: 1.2em; }}
.legend i {{ display: inline-block; width: 1em; height: 1em; border-radius: 3px; vertical-align: -2px;
  margin-right: .4em; }}
.legend i.target {{ background: {RED}; }}
.legend i.distractor {{ background: {BLUE}; }}
.legend i.heat {{ width: 5em; background: linear-gradient(90deg, #440154, #31688e, #35b779, #fde725); }}
@media (max-width: 640px) {{ .gradio-container main {{ padding: 12px !important; }} }}
.small {{ font-size: .85rem; opacity: .75; }}
"""

MAP_SIDE = 360
"""longer side of the maps, in pixels"""

# An editor that is given paint before it has drawn itself loses it.
EDITOR_READY = """async () => {
  const pause = (time) => new Promise((resolve) => setTimeout(resolve, time));
  while (!document.querySelector("#editor canvas")) await pause(100);
  await pause(500);
}"""

LEGEND = """<div class="legend"><span><i class="target"></i>found</span>
<span><i class="distractor"></i>distracting objects</span><span>0 <i class="heat"></i>1</span></div>"""


# Which thumbnail was clicked.
STRIP_CLICK = """element.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) trigger("click", {index: Number(button.dataset.index)});
});"""

EDITOR_PIXELS = 4 * steps.LONGEST**2
"""most pixels of a picture from the editor; it was given one of ``steps.LONGEST``"""


class Session(NamedTuple):
    """What the server keeps for a visitor."""

    supports: gr.State
    """list[Support], without the one in the editor"""
    number: gr.State
    """of the supports, see :class:`Findings`"""
    photos: gr.State
    """list[Photo]"""
    findings: gr.State
    chosen: gr.State
    """place of the photo that is shown large"""


class SupportControls(NamedTuple):
    """The controls of the support."""

    file: gr.File
    editor: gr.ImageEditor
    sharpen: gr.Button
    add: gr.Button
    kept: gr.Column
    strip: gr.HTML
    remove: gr.Button
    clear: gr.Button


class PhotoControls(NamedTuple):
    """The controls of the photos to search."""

    files: gr.File
    strip: gr.HTML


class ResultControls(NamedTuple):
    """The controls of the results."""

    go: gr.Button
    status: gr.HTML
    found: gr.HTML
    threshold: gr.Slider
    edges: gr.Checkbox
    download: gr.HTML
    maps: gr.HTML


def build_page(segmenter: Segmenter[Any, Any]) -> gr.Blocks:
    """Build the page, with the embedded example on it and its result."""
    network = segmenter if isinstance(segmenter, NTRESegmenter) else None
    example, photos = steps.example(None if network is None else network.config.data)
    editor = steps.editor_of(example)
    findings = steps.segment(segmenter, editor, [], photos)
    title = "NTRENet: few-shot segmentation"
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True, delete_cache=(300, 1800)) as page:
        session = Session(*map(gr.State, ([], 0, photos, findings, 0)))
        text(
            "<h1>Few-shot segmentation</h1>Paint an object in one photo, and objects of its kind are found in others,"
            " even of a kind that was never trained on."
        )
        with gr.Row():
            with gr.Column(scale=5, min_width=260):
                support = support_controls(example.mask.shape[::-1])
                photo = photo_controls()
            with gr.Column(scale=6, min_width=260):
                result = result_controls(segmenter, edges=network is None)
        text(f'<div class="small">This is {html.escape(segmenter.about)}.</div>')
        draw = {
            "fn": drawn,
            "inputs": [*session[1:], result.threshold, result.edges],
            "outputs": [photo.strip, result.status, result.found, result.download, result.maps],
            "show_progress": "hidden",
        }
        page.load(lambda: editor, None, support.editor, js=EDITOR_READY, show_progress="hidden")
        page.load(**draw)
        connect_supports(session, support, draw)
        connect_photos(session, photo, draw)
        connect_segment(segmenter, session, support, result, draw)
    return page


def support_controls(canvas_size: tuple[int, ...]) -> SupportControls:
    """Lay out step 1. ``canvas_size``: width and height of the example, in whose middle a layer is laid."""
    step(1, "Show the object", "Drop a photo and brush over the object; rough paint can be sharpened.")
    file = drop("support-file", "single")
    editor = gr.ImageEditor(
        label="the photo that shows the object, to be painted over",
        show_label=False,
        sources=(),
        transforms=(),
        layers=False,
        brush=BRUSH,
        format="png",
        canvas_size=canvas_size,
        buttons=[],
        height=440,
        interactive=True,
        elem_id="editor",
    )
    editor.convert_and_format_image = bounded(editor.convert_and_format_image)
    with gr.Row():
        sharpen = gr.Button("Sharpen my mask", size="sm", min_width=60, elem_id="sharpen")
        add = gr.Button("Keep this one, and show another", size="sm", min_width=60, elem_id="add")
    with gr.Column(visible=False) as kept:
        strip = gr.HTML(elem_id="supports", padding=False)
        with gr.Row():
            remove = gr.Button("Remove the last", size="sm", min_width=60, elem_id="remove")
            clear = gr.Button("Remove all", size="sm", min_width=60)
    return SupportControls(file, editor, sharpen, add, kept, strip, remove, clear)


def photo_controls() -> PhotoControls:
    """Lay out step 2."""
    step(2, "Choose where to look", "Drop other photos; click one to see its result.")
    files = drop("photo-files", "multiple")
    return PhotoControls(files, gr.HTML(elem_id="photos", padding=False, js_on_load=STRIP_CLICK))


def result_controls(segmenter: Segmenter[Any, Any], edges: bool) -> ResultControls:
    """Lay out step 3, and the places of what is found."""
    step(3, "Segment", "Change threshold and edges afterwards: nothing is searched again.")
    go = gr.Button("Segment", variant="primary", elem_id="segment")
    status, found = text("", elem_id="status"), text("", elem_id="found")
    threshold = gr.Slider(0.05, 0.95, segmenter.threshold, step=0.01, label="Threshold", elem_id="threshold")
    sharp = gr.Checkbox(edges, label="Sharp edges (GrabCut)", elem_id="edges")
    download, maps = text("", elem_id="download"), text("", elem_id="maps")
    return ResultControls(go, status, found, threshold, sharp, download, maps)


def connect_supports(session: Session, control: SupportControls, draw: dict[str, Any]) -> None:
    """Let supports be opened, painted, kept and removed; what was found with others is no longer shown."""

    def keep(supports: list[Support], number: int) -> list[Any]:
        thumbnails = [("support", steps.support_thumbnail(support)) for support in supports]
        return [supports, number, strip(thumbnails), gr.Column(visible=bool(supports))]

    supports, kept = [session.supports, session.number], [control.strip, control.kept]
    opened = control.file.upload(
        plainly(lambda path, number: [steps.open_support(path), number + 1]),
        [control.file, session.number],
        [control.editor, session.number],
    )
    opened.then(lambda: None, None, control.file, show_progress="hidden").then(**draw)
    control.sharpen.click(plainly(steps.sharpen), control.editor, control.editor)
    control.add.click(
        plainly(lambda editor, supports, number: [*keep(steps.add_support(editor, supports), number), None]),
        [control.editor, *supports],
        [*supports, *kept, control.editor],
    )
    control.remove.click(lambda held, n: keep(held[:-1], n + 1), supports, [*supports, *kept]).then(**draw)
    control.clear.click(lambda number: keep([], number + 1), session.number, [*supports, *kept]).then(**draw)


def connect_photos(session: Session, control: PhotoControls, draw: dict[str, Any]) -> None:
    """Let photos be dropped, and one of them be looked at."""

    def look_in(paths: list[str]) -> Any:
        photos, complaints = steps.read_photos(paths)
        for complaint in complaints:
            gr.Warning(html.escape(complaint, quote=False))
        return [photos, 0] if photos else gr.skip()

    def choose(event: gr.EventData) -> int:
        return int(event.index)

    dropped = control.files.upload(look_in, control.files, [session.photos, session.chosen])
    dropped.then(**draw).then(lambda: None, None, control.files, show_progress="hidden")
    control.strip.click(choose, None, session.chosen).then(**draw)


def connect_segment(
    segmenter: Segmenter[Any, Any],
    session: Session,
    support: SupportControls,
    result: ResultControls,
    draw: dict[str, Any],
) -> None:
    """Let the button search, and the threshold and the edges draw again."""
    result.threshold.change(**draw, trigger_mode="always_last")
    result.edges.change(**draw, trigger_mode="always_last")
    ready = {"fn": lambda: gr.Button("Segment", interactive=True), "outputs": result.go, "queue": False}
    busy = result.go.click(lambda: gr.Button("Segmenting ...", interactive=False), None, result.go, queue=False)
    done = busy.then(
        plainly(functools.partial(steps.segment, segmenter)),
        [support.editor, session.supports, session.photos, session.number],
        session.findings,
        show_progress_on=result.found,
        concurrency_limit=1,
    )
    done.success(**ready).then(**draw)
    done.failure(**ready).then(lambda: "It failed; the terminal says why.", None, result.status)


def drawn(
    number: int, photos: list[Photo], findings: Findings, chosen: int, threshold: float, sharp: bool
) -> list[str]:
    """Draw the strip of photos, the status, the chosen photo, the download of its mask, and its maps, as HTML."""
    all_found = [findings.of(photo, number) for photo in photos]
    thumbnails = [
        (
            f"{photo.name}{'' if found is None else ' with what is found'}",
            steps.thumbnail(photo, found, threshold, sharp),
        )
        for photo, found in zip(photos, all_found, strict=True)
    ]
    photo, found = photos[chosen], all_found[chosen]
    seen = steps.view(photo, found, threshold, sharp)
    status = "Paint the object, then press Segment." if found is None else findings.sentence
    alternative = photo.name if seen.mask is None else f"{photo.name}, {seen.mask.mean():.0%} of it found"
    assert seen.photo is not None
    return [strip(thumbnails, chosen), status, image(seen.photo, alternative), download(photo, seen), maps(seen)]


def strip(thumbnails: list[tuple[str, np.ndarray]], chosen: int | None = None) -> str:
    """Lay out thumbnails with their descriptions as buttons; one of them may be pressed."""
    pressed = ["true" if n == chosen else "false" for n in range(len(thumbnails))]
    buttons = [
        f'<button type="button" data-index="{n}" aria-pressed="{pressed[n]}">{image(picture, name)}</button>'
        for n, (name, picture) in enumerate(thumbnails)
    ]
    return f'<div class="strip">{"".join(buttons)}</div>'


def download(photo: Photo, seen: View) -> str:
    """Make a link that holds the mask's file."""
    if seen.mask is None:
        return ""
    data = base64.b64encode(steps.mask_png(photo, seen.mask)).decode()
    name = html.escape(f"{photo.name}_mask.png")
    return f'<a download="{name}" href="data:image/png;base64,{data}">Download the mask</a>'


def maps(seen: View) -> str:
    """Lay out the network's maps with their names and a legend; nothing where there are none."""
    named = {"prior: like the object": seen.prior, "background": seen.bg, "distracting objects": seen.distractor}
    figures = [
        f"<figure>{image(steps.shrunk(picture, MAP_SIDE), name)}<figcaption>{name}</figcaption></figure>"
        for name, picture in named.items()
        if picture is not None
    ]
    return f'What the network thinks:<div class="maps">{"".join(figures)}</div>{LEGEND}' if figures else ""


def image(pixels: np.ndarray, alternative: str) -> str:
    """Write a picture with its alternative text as HTML."""
    data = base64.b64encode(encoded(Image.fromarray(pixels), "JPEG", quality=90)).decode()
    return f'<img alt="{html.escape(alternative)}" src="data:image/jpeg;base64,{data}">'


def bounded(convert: Callable[..., Any]) -> Callable[..., Any]:
    """Make gradio's reader of the editor's pictures refuse what an upload may not be: it looks at none of this itself.

    Raises:
        gr.Error: another format, or more pixels than the page's own editor sends.
    """

    def checked(file: Any, *arguments: Any, **options: Any) -> Any:
        if file is not None:
            try:
                source = BytesIO(file) if isinstance(file, bytes) else file.path
                with Image.open(source, formats=tuple(FORMATS)) as opened:
                    pixels = opened.width * opened.height
            except (UnidentifiedImageError, Image.DecompressionBombError) as error:
                raise gr.Error("the editor's picture cannot be read; drop the photo again") from error
            if pixels > EDITOR_PIXELS:
                raise gr.Error(f"the editor's picture has more than {EDITOR_PIXELS / 1e6:.0f} megapixels")
        return convert(file, *arguments, **options)

    return checked


def plainly(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Let a user's mistake be shown as its message, and everything stay as it is."""

    def shown(*values: Any) -> Any:
        try:
            return handler(*values)
        except UserError as error:
            gr.Warning(html.escape(str(error), quote=False))
            return gr.skip()

    return shown


def text(html: str, **settings: Any) -> gr.HTML:
    """Add a piece of HTML without a frame."""
    return gr.HTML(html, padding=False, **settings)


def step(number: int, title: str, sentence: str) -> None:
    """Add the heading of a step."""
    text(f'<div class="step"><b>{number}</b><h3>{title}</h3><span>{sentence}</span></div>')


def drop(name: str, count: str) -> gr.File:
    """Where files are dropped. What they hold is judged here, by util/segment/pictures.py, not by the browser."""
    return gr.File(
        show_label=False, file_types=["image"], file_count=count, height=64, elem_id=name, elem_classes="drop"
    )
