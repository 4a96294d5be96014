"The freshness check of tools/notebooks.py, on notebooks that are edited and not run."
import copy
import nbformat.v4 as nbf
import pytest
from notebooks import stale

TABLE = "| model | FID |\n|---|---|\n| DiT | 61.10 |\n| DeCo | 31.35 |"


def code(source: str, *outputs):
    return nbf.new_code_cell(source, outputs=list(outputs))


def display(**data):
    return nbf.new_output("display_data", {mime.replace("_", "/"): content for mime, content in data.items()})


def printed(text: str):
    return nbf.new_output("stream", name="stdout", text=text)


@pytest.fixture
def saved():
    "A notebook with an output of each kind."
    return nbf.new_notebook(cells=[
        nbf.new_markdown_cell("# A page"),
        code("print('loss', loss)", printed("loss 0.151, 64 samples\n")),
        code("loss", nbf.new_output("execute_result", {"text/plain": "tensor(0.25)"}, execution_count=1)),
        code("Markdown(table)", display(text_markdown=TABLE, text_plain="<Markdown object>")),
        code("publish(table)", display(text_markdown=TABLE)),
        code("HTML(table)", display(text_html="<td>61.10</td>", text_plain="<HTML object>")),
        code("plt.show()", display(image_png="iVBORw0KGgo=", text_plain="<Figure size 640x480 with 1 Axes>")),
        code("#| timing\nprint(seconds)", printed("3.2 s\n")),
        code("#| slow\nprint(hours)", printed("12 h\n")),
    ])


@pytest.fixture
def fresh(saved): return copy.deepcopy(saved)


def test_an_untouched_copy_is_fresh(saved, fresh):
    assert stale(saved, fresh) == []


def test_rounding_and_times_are_fresh(saved, fresh):
    "Another processor's last digits, a slower machine, a cell that is not run, another drawing of a figure."
    fresh.cells[1].outputs[0].text = "loss 0.1512, 64 samples\n"
    fresh.cells[6].outputs[0].data["image/png"] = "iVBORw0KGgp="
    fresh.cells[7].outputs[0].text = "30.7 s, and it waited\n"
    fresh.cells[8].outputs = []
    assert stale(saved, fresh) == []


def test_a_stream_in_parts_is_the_same_stream(saved, fresh):
    fresh.cells[1].outputs = [printed("loss 0.151, "), printed("64 samples\n")]
    assert stale(saved, fresh) == []


@pytest.mark.parametrize("index, old, new", [
    (1, "0.151", "0.171"), (1, "samples", "pictures"), (1, "64 samples", "64 samples, 2 broken"),
    (2, "0.25", "0.35"), (3, "31.35", "41.35"), (3, "DeCo", "JiT"), (3, "| DiT | 61.10 |\n", ""),
    (4, "31.35", "41.35"), (5, "61.10", "16.10")])
def test_doctored_text_is_caught(saved, fresh, index, old, new):
    "A number, a word, a row of a table: printed, as a result, in Markdown, in Markdown alone, in HTML."
    output = saved.cells[index].outputs[0]
    if output.output_type == "stream": output.text = output.text.replace(old, new)
    else: output.data = {mime: content.replace(old, new) for mime, content in output.data.items()}
    problem, = stale(saved, fresh)
    assert problem.startswith(f"cell {index}: other text")


@pytest.mark.parametrize("index", [1, 2, 3, 4, 5, 6, 7])
def test_a_missing_output_is_caught(saved, fresh, index):
    "Saved or fresh, of a timed cell too."
    fresh.cells[index].outputs = []
    expected = [f"cell {index}: other kinds of output"]
    assert stale(saved, fresh) == expected and stale(fresh, saved) == expected


def test_another_kind_is_caught(saved, fresh):
    "A figure that is only its text, a table that lost its Markdown, an error."
    del saved.cells[6].outputs[0].data["image/png"]
    del saved.cells[3].outputs[0].data["text/markdown"]
    saved.cells[1].outputs = [nbf.new_output("error", ename="ValueError", evalue="loss 0.151", traceback=[])]
    assert stale(saved, fresh) == [f"cell {i}: other kinds of output" for i in (1, 3, 6)]


def test_a_missing_cell_is_caught(saved, fresh):
    del fresh.cells[2]
    assert stale(saved, fresh) == ["another number of cells"]
