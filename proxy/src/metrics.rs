//! Counters of one worker: plain cells, no locks and no atomics, merged with the other workers' when scraped.
//!
//! A series is resolved once ([`Registry::counter`], [`Registry::histogram`]) and kept by whoever counts; the
//! request path only adds to cells. [`Snapshot`] is plain data that crosses threads, and [`Snapshot::merge`]
//! adds the workers up. Istio's own names and labels are in [`standard`].

pub mod standard;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::rc::Rc;
use std::sync::Arc;

/// Histogram bounds that Istio's proxies use, without the last, infinite one.
pub const BUCKETS: [f64; 19] = [
    0.5,
    1.0,
    5.0,
    10.0,
    25.0,
    50.0,
    100.0,
    250.0,
    500.0,
    1000.0,
    2500.0,
    5000.0,
    10_000.0,
    30_000.0,
    60_000.0,
    300_000.0,
    600_000.0,
    1_800_000.0,
    3_600_000.0,
];

/// Most label sets one metric name may have on one worker; more go to one series without labels, so that a
/// hostile client cannot fill the memory with names it makes up.
const MAX_SERIES_PER_NAME: usize = 20_000;

/// A counter or gauge of one worker.
#[derive(Debug, Default)]
pub struct Counter(Cell<u64>);

impl Counter {
    /// Adds one.
    pub fn inc(&self) {
        self.add(1);
    }

    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.set(self.0.get().wrapping_add(n));
    }

    /// Takes `n` away; for gauges.
    pub fn sub(&self, n: u64) {
        self.0.set(self.0.get().wrapping_sub(n));
    }

    /// The value now.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.get()
    }
}

/// A histogram of one worker over [`BUCKETS`].
#[derive(Debug, Default)]
pub struct Histogram {
    buckets: [Cell<u64>; BUCKETS.len() + 1],
    sum: Cell<f64>,
}

impl Histogram {
    /// Counts one value.
    pub fn observe(&self, value: f64) {
        let at = BUCKETS.iter().position(|bound| value <= *bound).unwrap_or(BUCKETS.len());
        if let Some(bucket) = self.buckets.get(at) {
            bucket.set(bucket.get() + 1);
        }
        self.sum.set(self.sum.get() + value);
    }
}

/// Whether a series only grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// May fall.
    Gauge,
}

/// Name and rendered labels of a series.
type Key = (&'static str, Arc<str>);

/// Every series of one worker.
#[derive(Debug, Default)]
pub struct Registry {
    counters: RefCell<BTreeMap<Key, (Kind, Rc<Counter>)>>,
    histograms: RefCell<BTreeMap<Key, Rc<Histogram>>>,
    sizes: RefCell<BTreeMap<&'static str, usize>>,
}

impl Registry {
    /// The counter of this name and these labels.
    pub fn counter(&self, name: &'static str, labels: &[(&str, &str)]) -> Rc<Counter> {
        self.cell(Kind::Counter, name, labels)
    }

    /// The gauge of this name and these labels.
    pub fn gauge(&self, name: &'static str, labels: &[(&str, &str)]) -> Rc<Counter> {
        self.cell(Kind::Gauge, name, labels)
    }

    fn cell(&self, kind: Kind, name: &'static str, labels: &[(&str, &str)]) -> Rc<Counter> {
        let mut key: Key = (name, render_labels(labels).into());
        let mut counters = self.counters.borrow_mut();
        if !counters.contains_key(&key) && self.is_full(name) {
            key.1 = Arc::default();
        }
        Rc::clone(&counters.entry(key).or_insert_with(|| (kind, Rc::default())).1)
    }

    /// The histogram of this name and these labels.
    pub fn histogram(&self, name: &'static str, labels: &[(&str, &str)]) -> Rc<Histogram> {
        let mut key: Key = (name, render_labels(labels).into());
        let mut histograms = self.histograms.borrow_mut();
        if !histograms.contains_key(&key) && self.is_full(name) {
            key.1 = Arc::default();
        }
        Rc::clone(histograms.entry(key).or_default())
    }

    fn is_full(&self, name: &'static str) -> bool {
        let mut sizes = self.sizes.borrow_mut();
        let size = sizes.entry(name).or_default();
        *size += 1;
        *size > MAX_SERIES_PER_NAME
    }

    /// All values now, as data that may leave the worker.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let counters = self.counters.borrow();
        let values = counters.iter().map(|(key, (kind, cell))| (key.clone(), (*kind, cell.get())));
        let histograms = self.histograms.borrow();
        let distributions = histograms.iter().map(|(key, h)| {
            let buckets = h.buckets.iter().map(Cell::get).collect();
            (key.clone(), Distribution { buckets, sum: h.sum.get() })
        });
        Snapshot { values: values.collect(), distributions: distributions.collect() }
    }
}

/// One histogram's values, not cumulated.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Distribution {
    /// Counts per bucket; the last is for everything above the largest bound.
    pub buckets: Vec<u64>,
    /// Sum of all values.
    pub sum: f64,
}

/// The values of one worker, or of several added up.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Snapshot {
    values: BTreeMap<Key, (Kind, u64)>,
    distributions: BTreeMap<Key, Distribution>,
}

impl Snapshot {
    /// Adds another worker's values to these.
    pub fn merge(&mut self, other: Self) {
        for (key, (kind, value)) in other.values {
            let entry = self.values.entry(key).or_insert((kind, 0));
            entry.1 = entry.1.wrapping_add(value);
        }
        for (key, from) in other.distributions {
            let into = self.distributions.entry(key).or_default();
            into.buckets.resize(from.buckets.len().max(into.buckets.len()), 0);
            for (a, b) in into.buckets.iter_mut().zip(&from.buckets) {
                *a += b;
            }
            into.sum += from.sum;
        }
    }

    /// Sum over every series of this name whose rendered labels contain all of `having`.
    #[must_use]
    pub fn sum(&self, name: &str, having: &[&str]) -> u64 {
        self.values
            .iter()
            .filter(|((n, labels), _)| *n == name && having.iter().all(|h| labels.contains(h)))
            .map(|(_, (_, value))| value)
            .sum()
    }

    /// Every counter and gauge: name, rendered labels, value.
    pub fn values(&self) -> impl Iterator<Item = (&str, &str, u64)> {
        self.values.iter().map(|((name, labels), (_, v))| (*name, &**labels, *v))
    }

    /// The text form that Prometheus scrapes.
    #[must_use]
    pub fn prometheus(&self) -> String {
        let mut out = String::new();
        let mut last = "";
        for ((name, labels), (kind, value)) in &self.values {
            let name = *name;
            if name != last {
                let kind = if *kind == Kind::Counter { "counter" } else { "gauge" };
                out.push_str(&format!("# TYPE {name} {kind}\n"));
                last = name;
            }
            write_line(&mut out, name, labels, "", &value.to_string());
        }
        for ((name, labels), distribution) in &self.distributions {
            let name = *name;
            if name != last {
                out.push_str(&format!("# TYPE {name} histogram\n"));
                last = name;
            }
            write_distribution(&mut out, name, labels, distribution);
        }
        out
    }
}

fn write_distribution(out: &mut String, name: &str, labels: &str, distribution: &Distribution) {
    let mut cumulated = 0;
    let bucket = format!("{name}_bucket");
    for (n, count) in distribution.buckets.iter().enumerate() {
        cumulated += count;
        let bound = BUCKETS.get(n).map_or_else(|| "+Inf".to_owned(), ToString::to_string);
        write_line(out, &bucket, labels, &format!("le=\"{bound}\""), &cumulated.to_string());
    }
    write_line(out, &format!("{name}_sum"), labels, "", &distribution.sum.to_string());
    write_line(out, &format!("{name}_count"), labels, "", &cumulated.to_string());
}

fn write_line(out: &mut String, name: &str, labels: &str, extra: &str, value: &str) {
    let comma = if labels.is_empty() || extra.is_empty() { "" } else { "," };
    // writing to a String cannot fail
    let _written: std::fmt::Result = if labels.is_empty() && extra.is_empty() {
        writeln!(out, "{name} {value}")
    } else {
        writeln!(out, "{name}{{{labels}{comma}{extra}}} {value}")
    };
}

fn render_labels(labels: &[(&str, &str)]) -> String {
    let mut out = String::new();
    for (name, value) in labels {
        if !out.is_empty() {
            out.push(',');
        }
        out.push_str(name);
        out.push_str("=\"");
        for c in value.chars() {
            match c {
                '\\' => out.push_str("\\\\"),
                '"' => out.push_str("\\\""),
                '\n' => out.push_str("\\n"),
                c => out.push(c),
            }
        }
        out.push('"');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_workers_add_up() {
        let (a, b) = (Registry::default(), Registry::default());
        a.counter("x_total", &[("k", "v\"1")]).add(2);
        b.counter("x_total", &[("k", "v\"1")]).inc();
        b.gauge("open", &[]).inc();
        a.histogram("ms", &[("k", "v")]).observe(3.0);
        b.histogram("ms", &[("k", "v")]).observe(1e9);
        let mut all = a.snapshot();
        all.merge(b.snapshot());
        assert_eq!(all.sum("x_total", &[]), 3);
        let text = all.prometheus();
        assert!(text.contains("# TYPE x_total counter\nx_total{k=\"v\\\"1\"} 3\n"), "{text}");
        assert!(text.contains("# TYPE open gauge\nopen 1\n"), "{text}");
        assert!(text.contains("ms_bucket{k=\"v\",le=\"5\"} 1\n"), "{text}");
        assert!(
            text.contains(
                "ms_bucket{k=\"v\",le=\"+Inf\"} 2\nms_sum{k=\"v\"} 1000000003\nms_count{k=\"v\"} 2\n"
            )
        );
    }

    #[test]
    fn label_sets_are_bounded() {
        let registry = Registry::default();
        for n in 0..MAX_SERIES_PER_NAME + 10 {
            registry.counter("x_total", &[("n", &n.to_string())]).inc();
        }
        let text = registry.snapshot().prometheus();
        assert!(text.contains("\nx_total 10\n"), "the rest is counted without labels");
    }
}
