//! What ran when: spans on tracks, in a file that chrome://tracing and Perfetto show.

use serde::{Serialize, Serializer};
use std::borrow::Cow;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Spans that a trace holds at most, some tens of megabytes of memory; later ones are counted and left
/// out, and the file says so.
pub const MAX_SPANS: usize = 1 << 20;

/// Spans recorded since it began.
#[derive(Debug)]
pub struct Trace {
    began: Instant,
    tracks: Vec<String>,
    spans: Vec<Span>,
    max_spans: usize,
    left_out: u64,
}

/// Names a track of a trace: what runs on one does not overlap, but for spans inside of others. They count
/// from 1, for viewers take thread 0 for an idle one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Track(u32);

/// Something that took time.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Where it ran.
    pub track: Track,
    /// What it was; spans of the same work share it.
    pub label: Arc<Label>,
    /// Since the trace began.
    pub start: Duration,
    /// How long it took.
    pub length: Duration,
}

impl Span {
    /// When it was over, since the trace began.
    pub fn end(&self) -> Duration {
        self.start + self.length
    }
}

/// What a span was.
#[derive(Clone, Debug, PartialEq)]
pub struct Label {
    /// In a word.
    pub name: Cow<'static, str>,
    /// What else there is to say.
    pub args: Vec<(&'static str, Arg)>,
}

/// A fact about a span.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Arg {
    /// A name.
    Text(String),
    /// A count.
    Number(u64),
}

impl From<&str> for Arg {
    fn from(text: &str) -> Arg {
        Arg::Text(text.to_owned())
    }
}

impl From<usize> for Arg {
    fn from(number: usize) -> Arg {
        Arg::Number(number as u64)
    }
}

impl Label {
    /// One without arguments.
    pub fn new(name: impl Into<Cow<'static, str>>) -> Label {
        Label {
            name: name.into(),
            args: Vec::new(),
        }
    }

    /// The label with one more argument.
    pub fn with(mut self, name: &'static str, value: impl Into<Arg>) -> Label {
        self.args.push((name, value.into()));
        self
    }

    /// The argument of this name.
    pub fn arg(&self, name: &str) -> Option<&Arg> {
        let found = self.args.iter().find(|(other, _)| *other == name);
        found.map(|(_, value)| value)
    }
}

impl Default for Trace {
    fn default() -> Trace {
        Trace::new()
    }
}

impl Trace {
    /// One that begins now.
    pub fn new() -> Trace {
        Trace {
            began: Instant::now(),
            tracks: Vec::new(),
            spans: Vec::new(),
            max_spans: MAX_SPANS,
            left_out: 0,
        }
    }

    /// The track of this name, made where there is none. Tracks are shown in the order of their making.
    pub fn track(&mut self, name: &str) -> Track {
        let found = self.tracks.iter().position(|track| track == name);
        let index = found.unwrap_or_else(|| {
            self.tracks.push(name.to_owned());
            self.tracks.len() - 1
        });
        Track(index as u32 + 1)
    }

    /// Adds a span. Of what started before the trace began, the rest.
    pub fn add(
        &mut self,
        track: Track,
        label: impl Into<Arc<Label>>,
        start: Instant,
        length: Duration,
    ) {
        if self.spans.len() >= self.max_spans {
            self.left_out += 1;
            return;
        }
        let since = |time: Instant| time.saturating_duration_since(self.began);
        let (start, end) = (since(start), since(start + length));
        self.spans.push(Span {
            track,
            label: label.into(),
            start,
            length: end - start,
        });
    }

    /// The spans, in the order in which they were added.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Spans that there was no room for.
    pub fn left_out(&self) -> u64 {
        self.left_out
    }

    /// Writes it as Chrome trace JSON, an event a line, sorted by time; times are in microseconds.
    /// `process` is the name of the program.
    ///
    /// # Errors
    /// What `to` gives.
    pub fn write(&self, process: &str, mut to: impl Write) -> io::Result<()> {
        to.write_all(b"{\"traceEvents\":[")?;
        let mut events = 0;
        let mut write = |event: &Event<'_>| {
            to.write_all(if events == 0 { b"\n" } else { b",\n" })?;
            events += 1;
            serde_json::to_writer(&mut to, event).map_err(io::Error::from)
        };
        // Of spans that start together, the outer ones come first.
        let mut sorted: Vec<&Span> = self.spans.iter().collect();
        sorted.sort_by_key(|span| (span.start, std::cmp::Reverse(span.length)));
        let name = [("name", Arg::from(process))];
        write(&Event::metadata("process_name", Track(1), &name))?;
        for (index, name) in (1..).zip(&self.tracks) {
            let name = [("name", Arg::Text(name.clone()))];
            let order = [("sort_index", Arg::Number(index.into()))];
            write(&Event::metadata("thread_name", Track(index), &name))?;
            write(&Event::metadata("thread_sort_index", Track(index), &order))?;
        }
        for span in &sorted {
            write(&Event {
                ph: "X",
                name: &span.label.name,
                ts: Some(microseconds(span.start)),
                dur: Some(microseconds(span.length)),
                pid: 1,
                tid: span.track,
                s: None,
                args: &span.label.args,
            })?;
        }
        if self.left_out > 0 {
            let end = sorted.iter().map(|span| span.end()).max();
            let note = format!(
                "{} later spans are left out: a trace holds {} at most",
                self.left_out, self.max_spans
            );
            write(&Event {
                ph: "i",
                ts: end.map(microseconds),
                s: Some("g"),
                ..Event::metadata(&note, Track(1), &[])
            })?;
        }
        to.write_all(b"\n]}\n")
    }
}

/// An event as viewers read it.
#[derive(Serialize)]
struct Event<'a> {
    ph: &'static str,
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    ts: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dur: Option<f64>,
    pid: u32,
    tid: Track,
    #[serde(skip_serializing_if = "Option::is_none")]
    s: Option<&'static str>,
    #[serde(serialize_with = "as_map")]
    args: &'a [(&'static str, Arg)],
}

impl<'a> Event<'a> {
    fn metadata(name: &'a str, tid: Track, args: &'a [(&'static str, Arg)]) -> Event<'a> {
        Event {
            ph: "M",
            name,
            ts: None,
            dur: None,
            pid: 1,
            tid,
            s: None,
            args,
        }
    }
}

fn as_map<S: Serializer>(args: &&[(&'static str, Arg)], to: S) -> Result<S::Ok, S::Error> {
    to.collect_map(args.iter().map(|(name, value)| (name, value)))
}

/// Perfetto multiplies by a thousand and cuts to nanoseconds, and drops a span that sticks out of another
/// one; so what it gets is the least number that it makes these nanoseconds of.
fn microseconds(time: Duration) -> f64 {
    let nanoseconds = time.as_nanos();
    let nearest = nanoseconds as f64 / 1e3;
    match ((nearest * 1e3) as u128) < nanoseconds {
        true => nearest.next_up(),
        false => nearest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn written(trace: &Trace) -> Value {
        let mut bytes = Vec::new();
        trace.write("kiln", &mut bytes).unwrap();
        serde_json::from_slice(&bytes).unwrap()
    }

    const fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    #[test]
    fn a_trace_is_what_viewers_read() {
        let mut trace = Trace::new();
        let host = trace.track("host");
        let device = trace.track("device");
        assert_eq!(trace.track("host"), host);
        let began = trace.began;
        // Inner ones may be added first.
        let inner = Arc::new(Label::new("inner"));
        trace.add(host, inner.clone(), began + us(5), us(1));
        let outer = Label::new("outer")
            .with("phase", "decode")
            .with("tokens", 3);
        trace.add(host, outer, began + us(5), Duration::from_nanos(2500));
        trace.add(device, inner, began, us(7));
        let process = json!({"ph": "M", "name": "process_name", "pid": 1, "tid": 1,
            "args": {"name": "kiln"}});
        let expected = json!({"traceEvents": [
            process,
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "host"}},
            {"ph": "M", "name": "thread_sort_index", "pid": 1, "tid": 1, "args": {"sort_index": 1}},
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": 2, "args": {"name": "device"}},
            {"ph": "M", "name": "thread_sort_index", "pid": 1, "tid": 2, "args": {"sort_index": 2}},
            {"ph": "X", "name": "inner", "ts": 0.0, "dur": 7.0, "pid": 1, "tid": 2, "args": {}},
            {"ph": "X", "name": "outer", "ts": 5.0, "dur": 2.5, "pid": 1, "tid": 1,
             "args": {"phase": "decode", "tokens": 3}},
            {"ph": "X", "name": "inner", "ts": 5.0, "dur": 1.0, "pid": 1, "tid": 1, "args": {}},
        ]});
        assert_eq!(written(&trace), expected);
        assert_eq!(written(&Trace::new()), json!({"traceEvents": [process]}));
    }

    #[test]
    fn viewers_that_cut_to_nanoseconds_get_them() {
        let mut cut_short = 0;
        let far = (0..2000).map(|at| 3_600_000_000_000 + 7919 * at);
        for ns in (0..20_000).chain(far) {
            let us = microseconds(Duration::from_nanos(ns));
            assert_eq!((us * 1e3) as u64, ns);
            cut_short += u32::from((ns as f64 / 1e3 * 1e3) as u64 != ns);
        }
        assert!(cut_short > 0, "there is nothing to mend");
    }

    #[test]
    fn a_full_trace_says_what_it_lacks() {
        let mut trace = Trace::new();
        trace.max_spans = 2;
        let track = trace.track("host");
        for index in 0..5 {
            let start = trace.began + us(10 * index);
            trace.add(track, Label::new("work"), start, us(4));
        }
        assert_eq!((trace.spans().len(), trace.left_out()), (2, 3));
        let events = written(&trace);
        let note = events["traceEvents"].as_array().unwrap().last().unwrap();
        assert_eq!(
            (&note["ph"], &note["s"], &note["ts"]),
            (&json!("i"), &json!("g"), &json!(14.0))
        );
        assert_eq!(
            note["name"],
            "3 later spans are left out: a trace holds 2 at most"
        );
    }

    #[test]
    fn what_came_before_starts_with_the_trace() {
        let before = Instant::now();
        let mut trace = Trace::new();
        trace.began = before + us(10);
        let track = trace.track("host");
        for (length, left) in [(3, 0), (14, 4)] {
            trace.add(track, Label::new("early"), before, us(length));
            let span = trace.spans().last().unwrap();
            assert_eq!((span.start, span.length), (us(0), us(left)));
        }
    }
}
