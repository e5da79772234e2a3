//! The settings `workloads`: what becomes of workloads whose agents are silent.

use std::fmt;
use std::time::Duration;

use registry::lease::{MassLoss, Terms};

use super::Span;
use super::reader::{Reader, span, whole};

/// What holds unless the file says otherwise.
pub(super) const DEFAULT: Terms = Terms {
    lease: Duration::from_secs(30),
    remove_after: Duration::from_secs(600),
    mass_loss: MassLoss {
        share: 20,
        window: Duration::from_secs(60),
        least: 3,
        hold: Duration::from_secs(24 * 3600),
    },
};

/// What the file says.
pub(super) fn taken(reader: &mut Reader, base: Terms) -> Terms {
    let second = Duration::from_secs(1);
    let mass = base.mass_loss;
    let remove_after = reader.take("workloads.removeAfter", base.remove_after, |text| span(text, second));
    // What was removed cannot be held.
    let usual_window = mass.window.min(remove_after);
    Terms {
        lease: reader.take("workloads.lease", base.lease, |text| span(text, second)),
        remove_after,
        mass_loss: MassLoss {
            share: reader.take("workloads.massLossShare", mass.share, percent),
            window: reader.take("workloads.massLossWindow", usual_window, |text| span(text, second)),
            least: reader.take("workloads.massLossLeast", mass.least, |text| {
                usize::try_from(whole(text, 1)?).map_err(|error| error.to_string())
            }),
            hold: reader.take("workloads.massLossHold", mass.hold, |text| span(text, second)),
        },
    }
}

fn percent(text: &str) -> Result<u8, String> {
    let share = text.strip_suffix('%').unwrap_or(text).parse().ok();
    let share = share.filter(|share| (1..=100).contains(share));
    share.ok_or_else(|| format!("must be a share in percent, from 1 to 100, this is {text:?}"))
}

/// What no single setting can say.
pub(super) fn check(reader: &mut Reader, terms: &Terms) {
    let (window, remove_after) = (terms.mass_loss.window, terms.remove_after);
    if window > remove_after {
        let message = format!(
            "must not be longer than workloads.removeAfter: {} is more than {}, and what was removed cannot be held",
            Span(window),
            Span(remove_after)
        );
        reader.wrong("workloads.massLossWindow", message);
    }
}

/// The settings in force.
pub(super) fn write(f: &mut fmt::Formatter<'_>, terms: &Terms) -> fmt::Result {
    let Terms { lease, remove_after, mass_loss } = terms;
    let MassLoss { share, window, least, hold } = mass_loss;
    writeln!(f, "workloads:\n  lease: {}\n  removeAfter: {}", Span(*lease), Span(*remove_after))?;
    writeln!(f, "  massLossShare: {share}\n  massLossWindow: {}", Span(*window))?;
    writeln!(f, "  massLossLeast: {least}\n  massLossHold: {}", Span(*hold))
}
