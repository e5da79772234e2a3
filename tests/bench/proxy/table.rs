//! Medians and ratios, as lines and as JSON. Pure.

use std::fmt;

use serde_json::{Value, json};

use crate::contestant::Which;

/// Others may use this share of a processor without being mentioned.
const QUIET: f64 = 0.1;

/// What was measured of one contestant in one round; 0 where it was not.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sample {
    /// Requests a second.
    pub(crate) rate: f64,
    /// Microseconds of processor time for each.
    pub(crate) busy: f64,
    /// Microseconds within which 99 of 100 were answered.
    pub(crate) p99: f64,
    /// MiB.
    pub(crate) resident: f64,
    /// Processors that others kept busy.
    pub(crate) other: f64,
}

/// One case.
#[derive(Debug)]
pub(crate) struct Row {
    name: &'static str,
    ours: Vec<Sample>,
    envoys: Vec<Sample>,
}

type Part = (&'static str, fn(&Sample) -> f64);

const PARTS: [Part; 4] = [
    ("requests_per_second", |s| s.rate),
    ("cpu_us_per_request", |s| s.busy),
    ("p99_us", |s| s.p99),
    ("resident_mib", |s| s.resident),
];

/// Above the lines.
pub(crate) const HEAD: &str = concat!(
    "                requests/s               CPU us/request                  p99 us              MiB resident\n",
    "               ours     Envoy  ratio      ours     Envoy  ratio      ours     Envoy  ratio      ours     Envoy  ratio",
);

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

impl Row {
    pub(crate) fn new(name: &'static str) -> Self {
        Self { name, ours: Vec::new(), envoys: Vec::new() }
    }

    pub(crate) fn add(&mut self, which: Which, sample: Sample) {
        match which {
            Which::Ours => self.ours.push(sample),
            Which::Envoy => self.envoys.push(sample),
        }
    }

    /// Medians of both, and of the rounds' ratios.
    fn compared(&self, of: fn(&Sample) -> f64) -> (f64, f64, f64) {
        let ratios = self.ours.iter().zip(&self.envoys).map(|(ours, envoys)| of(ours) / of(envoys));
        (median(self.ours.iter().map(of)), median(self.envoys.iter().map(of)), median(ratios))
    }

    fn others(&self) -> f64 {
        self.ours.iter().chain(&self.envoys).map(|sample| sample.other).fold(0.0, f64::max)
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<10}", self.name)?;
        for (_, of) in PARTS {
            let (ours, envoys, ratio) = self.compared(of);
            if envoys > 0.0 {
                let digits = usize::from(envoys < 1000.0);
                write!(f, "{ours:>9.digits$} {envoys:>9.digits$} {ratio:>6.2}")?;
            } else {
                write!(f, "{:>9} {:>9} {:>6}", "-", "-", "-")?;
            }
        }
        Ok(())
    }
}

/// What disturbed, if something did.
pub(crate) fn warning(rows: &[Row]) -> Option<String> {
    let worst = rows.iter().map(Row::others).fold(0.0, f64::max);
    let percent = worst * 100.0;
    (worst > QUIET).then(|| {
        format!(
            "Other work had up to {percent:.0} % of a processor: p99 and requests/s may be off, CPU hardly."
        )
    })
}

/// Everything, with the samples.
pub(crate) fn json(rows: &[Row]) -> Value {
    let one = |row: &Row| {
        let mut value = json!({"case": row.name, "other_work": row.others()});
        for (name, of) in PARTS {
            let (ours, envoys, ratio) = row.compared(of);
            if envoys > 0.0 {
                let each = |samples: &[Sample]| samples.iter().map(of).collect::<Vec<_>>();
                value[name] = json!({"ours": ours, "envoy": envoys, "ratio": ratio,
                    "rounds": {"ours": each(&row.ours), "envoy": each(&row.envoys)}});
            }
        }
        value
    };
    rows.iter().map(one).collect()
}
