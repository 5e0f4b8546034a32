//! The page of `kiln-perf report` in a browser: what stands on it, on a screen and on a phone, in light and
//! in dark.

#![allow(clippy::expect_used, clippy::panic, reason = "a test")]

use kiln_benches::report::{Sources, html};
use kiln_benches::table::Table;
use kiln_benches::testing;
use serde_json::Value;
use std::fs;
use std::process::{Command, Output};
use tempfile::TempDir;

/// Measures the page, which is in a frame as wide as a phone or a screen, and leaves what it found as the
/// only text of the document.
const PROBE: &str = r##"
const page = JSON.parse(document.getElementById("page").textContent);
function texts(svg) {
  return [...svg.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
}
function measure(width) {
  return new Promise(done => {
    const frame = document.createElement("iframe");
    frame.style = `width: ${width}px; height: 800px; border: 0`;
    frame.srcdoc = page;
    frame.onload = () => {
      const doc = frame.contentDocument, win = frame.contentWindow;
      const stacks = [...doc.querySelectorAll("svg.stack")].map(svg => {
        const whole = svg.getBoundingClientRect();
        const parts = [...svg.querySelectorAll("rect")].map(r => r.getBoundingClientRect().width);
        const labels = [...svg.querySelectorAll("a")].filter(a => a.querySelector("text")).map(a =>
          a.querySelector("text").getBoundingClientRect().width < a.querySelector("rect").getBoundingClientRect().width);
        return { whole: whole.width, parts, labels };
      });
      const clashes = [];
      for (const svg of doc.querySelectorAll("svg.plot")) {
        const frame = svg.getBoundingClientRect(), all = texts(svg);
        all.forEach(([name, a], i) => {
          if (a.left < frame.left - 0.5 || a.right > frame.right + 0.5 || a.top < frame.top - 0.5 || a.bottom > frame.bottom + 0.5)
            clashes.push(`${name} is cut off`);
          for (const [other, b] of all.slice(i + 1))
            if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1)
              clashes.push(`${name} overlaps ${other}`);
        });
      }
      const sizes = [...doc.querySelectorAll("svg.plot text")].map(t => t.getBoundingClientRect().height);
      const links = [...doc.querySelectorAll("a[href]")].map(a => a.getAttribute("href"));
      win.location.hash = links.find(href => href.startsWith("#row-"));
      win.unfold();
      const colour = (selector, name) => win.getComputedStyle(doc.querySelector(selector))[name];
      done({
        width, stacks, clashes, smallest: Math.min(...sizes),
        scroll: doc.documentElement.scrollWidth, page: win.innerWidth,
        dead: links.filter(href => !href.startsWith("#") || !doc.getElementById(href.slice(1))),
        names: [...doc.querySelectorAll(".bars .name a")].map(a => a.textContent),
        text: doc.body.innerText, plots: doc.querySelectorAll("svg.plot").length,
        unfolded: doc.querySelectorAll("details[open]").length,
        requests: win.performance.getEntriesByType("resource").map(e => e.name),
        injected: win.injected === true || doc.querySelector("b, img") !== null,
        ink: colour("body", "color"), back: colour("body", "backgroundColor"), card: colour(".card", "backgroundColor"),
      });
    };
    document.body.append(frame);
  });
}
Promise.all([390, 1280].map(measure)).then(found => {
  document.body.replaceChildren(Object.assign(document.createElement("pre"), { textContent: "FOUND" + JSON.stringify(found) + "END" }));
});
"##;

/// What the browser finds at 390 and at 1280 pixels.
fn measure(page: &str, dark: bool) -> Vec<Value> {
    let dir = TempDir::new().expect("a temporary directory");
    let file = dir.path().join("probe.html");
    // In a script nothing is markup but its end.
    let page = serde_json::to_string(page)
        .expect("text")
        .replace('<', "\\u003c");
    let probe = format!(
        "<!DOCTYPE html><meta charset=utf-8><body>\
         <script type=application/json id=page>{page}</script><script>{PROBE}</script>"
    );
    fs::write(&file, probe).expect("a writable directory");
    let output = chromium(&dir, dark)
        .args(["--virtual-time-budget=20000", "--dump-dom"])
        .arg(format!("file://{}", file.display()))
        .output()
        .expect("chromium runs");
    let dom = text(&output);
    let found = dom
        .split_once("<pre>FOUND")
        .and_then(|(_, rest)| rest.split_once("END</pre>"));
    let (found, _) = found.unwrap_or_else(|| panic!("the page was not measured: {dom:.2000}"));
    let found = found
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&nbsp;", "\u{a0}")
        .replace("&amp;", "&");
    serde_json::from_str(&found).expect("measurements")
}

fn chromium(dir: &TempDir, dark: bool) -> Command {
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let found = names
        .into_iter()
        .find(|name| Command::new(name).arg("--version").output().is_ok());
    let name = found.expect("no chromium: this test needs one, `apt-get install -y chromium`");
    let mut command = Command::new(name);
    command
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
        ])
        .args([
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
        ])
        .args(["--window-size=1400,1000", "--hide-scrollbars"])
        .arg(format!(
            "--blink-settings=preferredColorScheme={}",
            if dark { 0 } else { 1 }
        ))
        .arg(format!(
            "--user-data-dir={}",
            dir.path().join("profile").display()
        ));
    command
}

fn text(output: &Output) -> String {
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn tables() -> [Table; 2] {
    [testing::table(1), testing::predicted_table()]
}

fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value[name].as_array().map_or(&[], Vec::as_slice)
}

#[test]
fn the_page_in_a_browser() {
    let mut tables = tables();
    // Text of a table is text.
    let model = &mut tables[0].models[0];
    model.model = "<b>opt</b>&<img src=x onerror=injected=true>".to_owned();
    model.steps[0].rows[0].shapes = "<script>injected = true</script>".to_owned();
    let sources = Sources::from([("cuda/attention.cu".to_owned(), "a < b && c".to_owned())]);
    let page = html(&tables, &sources).expect("a page");
    let light = measure(&page, false);
    let dark = measure(&page, true);
    for found in light.iter().chain(&dark) {
        assert_eq!(
            found["scroll"], found["page"],
            "horizontal scrolling at {}",
            found["width"]
        );
        assert_eq!(found["page"], found["width"]);
        for name in ["clashes", "dead", "requests"] {
            assert_eq!(
                list(found, name),
                [Value::Null; 0],
                "{name} at {}",
                found["width"]
            );
        }
        assert_eq!(found["injected"], false);
        assert!(
            found["smallest"].as_f64() > Some(10.0),
            "{}",
            found["smallest"]
        );
        assert_eq!(found["unfolded"], 1);
        // Four decode executables and a prefill on the CPU, one of each for the GPU.
        let stacks = list(found, "stacks");
        assert_eq!(stacks.len(), 7);
        for stack in stacks {
            let parts = list(stack, "parts").iter().filter_map(Value::as_f64);
            let (parts, whole) = (parts.sum::<f64>(), stack["whole"].as_f64().unwrap_or(0.0));
            assert!(
                whole > 200.0 && (parts / whole - 1.0).abs() < 1e-3,
                "{parts} of {whole}"
            );
            assert!(
                list(stack, "labels").iter().all(|fits| *fits == true),
                "{stack}"
            );
        }
        // A roofline each, lengths, batches.
        assert_eq!(found["plots"], 4);
        for row in tables
            .iter()
            .flat_map(|t| &t.models)
            .flat_map(|m| &m.steps[0].rows)
        {
            let names = list(found, "names");
            let spec = row.spec.replace(" -> ", "\u{a0}→\u{a0}");
            assert!(
                names.contains(&Value::from(spec)),
                "{} is missing",
                row.spec
            );
        }
        let text = found["text"].as_str().unwrap_or("");
        for needed in ["simulated", "predicted, not measured", "remainder", "Slope"] {
            assert!(text.contains(needed), "{needed}");
        }
    }
    for name in ["ink", "back", "card"] {
        assert_ne!(light[0][name], dark[0][name], "{name}");
    }
    assert_eq!(dark[0]["back"], "rgb(17, 22, 29)");
    assert_eq!(light[0]["back"], "rgb(246, 247, 249)");
}

fn kiln_perf(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kiln-perf"));
    command.args(args).output().expect("kiln-perf runs")
}

fn write(dir: &TempDir, name: &str, table: &Table) -> String {
    let path = dir.path().join(name);
    fs::write(&path, serde_json::to_string(table).expect("JSON")).expect("a writable directory");
    path.to_string_lossy().into_owned()
}

#[test]
fn the_programs_exit_codes() {
    let dir = TempDir::new().expect("a temporary directory");
    let old = write(&dir, "old.json", &testing::table(1));
    let noise = write(&dir, "noise.json", &testing::table(2));
    let mut table = testing::table(2);
    testing::slow_down(&mut table.models[0].steps[0].rows[2].time, 1.12);
    let slower = write(&dir, "slower.json", &table);
    table.machine.threads = Some(16);
    let elsewhere = write(&dir, "elsewhere.json", &table);
    table.version += 1;
    let newer = write(&dir, "newer.json", &table);
    for (args, code, expected) in [
        (vec!["compare", &old, &noise], 0, "0 slower"),
        (vec!["compare", &old, &slower], 1, "1 slower"),
        (
            vec!["compare", &old, &slower, "--json"],
            1,
            "\"verdict\":\"slower\"",
        ),
        (
            vec!["compare", &old, &slower, "--threshold", "20%"],
            0,
            "0 slower",
        ),
        (vec!["compare", &old, &elsewhere], 1, "16 threads"),
        (
            vec!["compare", &old, &elsewhere, "--across-machines"],
            1,
            "1 slower",
        ),
        (vec!["compare", &old, &newer], 1, "version 2"),
        (vec!["compare", &old, "missing.json"], 1, "missing.json"),
        (vec!["compare", &old], 2, "Usage"),
        (vec!["report", &old], 2, "--output"),
        (
            vec!["report", &old, "--markdown"],
            0,
            "| attention 12 x 64 |",
        ),
    ] {
        let output = kiln_perf(&args);
        let said = [&output.stdout[..], &output.stderr[..]].concat();
        let said = String::from_utf8_lossy(&said);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
        assert!(said.contains(expected), "{args:?}: {said}");
    }
}

#[test]
fn sources_are_read_from_bundles_alone() {
    let dir = TempDir::new().expect("a temporary directory");
    let mut table = testing::predicted_table();
    let page = dir
        .path()
        .join("report.html")
        .to_string_lossy()
        .into_owned();
    let bundle = dir.path().join("x.kiln");
    fs::create_dir_all(bundle.join("cuda")).expect("a directory");
    fs::write(bundle.join("cuda/attention.cu"), "// attends & reads").expect("a file");
    let bundle = bundle.to_string_lossy().into_owned();
    let path = write(&dir, "table.json", &table);
    let output = kiln_perf(&["report", &path, "-o", &page, "--bundle", &bundle]);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let html = fs::read_to_string(&page).expect("a page");
    assert!(html.contains("// attends &#38; reads") || html.contains("// attends &amp; reads"));

    let rows = &mut table.models[0].steps[0].rows;
    if let Some(resources) = &mut rows[0].resources {
        resources.source = "../table.json".to_owned();
    }
    let path = write(&dir, "table.json", &table);
    let output = kiln_perf(&["report", &path, "-o", &page, "--bundle", &bundle]);
    assert_eq!(output.status.code(), Some(1));
}

/// Kernels that overlap in their step leave nothing for the remainder: it is told, and not drawn.
#[test]
fn kernels_that_overlap_fill_their_step() {
    let page = html(&[testing::table_of_a_gpu()], &Sources::new()).expect("a page");
    assert!(page.contains("%), kernels overlap"), "{page}");
    assert!(page.contains("989 TFLOP/s (datasheet of H200)"), "{page}");
    let stacks: Vec<&str> = page.split("<svg class=\"stack\"").skip(1).collect();
    assert!(!stacks.is_empty());
    for stack in stacks {
        let stack = stack.split("</svg>").next().unwrap_or_default();
        // The first is the whole drawing's.
        let widths = stack.split(" width=\"").skip(2).map(|text| {
            let number = text.split('%').next().unwrap_or_default();
            number.parse::<f64>().expect("a width")
        });
        let widths: Vec<f64> = widths.collect();
        assert!(widths.iter().all(|&width| width >= 0.0), "{widths:?}");
        assert!(
            (widths.iter().sum::<f64>() - 100.0).abs() < 0.01,
            "{widths:?}"
        );
    }
}
