//! What follows the question mark of each call.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::api::Mode;

/// How new a read is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Consistency {
    /// It shows everything that was committed anywhere when it was asked for; needs a leader.
    #[default]
    Linearizable,
    /// It shows what this member has applied; its revision is in the answer.
    Stale,
}

/// Which objects to list.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Listing {
    /// Of this namespace only.
    pub namespace: Option<String>,
    /// With such labels: `app=web,tier!=db,env in (a,b),!old`.
    pub label_selector: Option<String>,
    /// With such fields: `metadata.name=web,spec.host!=x`.
    pub field_selector: Option<String>,
    /// The most objects of one page.
    #[schemars(range(min = 1, max = 10_000))]
    pub limit: Option<u32>,
    /// Where an earlier page ended.
    pub r#continue: Option<String>,
    /// How new the list is.
    pub consistency: Option<Consistency>,
}

/// Which rows to list.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rows {
    /// Of this namespace only.
    pub namespace: Option<String>,
    /// The most rows of one page.
    #[schemars(range(min = 1, max = 10_000))]
    pub limit: Option<u32>,
    /// Where an earlier page ended.
    pub r#continue: Option<String>,
    /// How new the list is.
    pub consistency: Option<Consistency>,
}

/// How to read one thing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Read {
    /// How new it is.
    pub consistency: Option<Consistency>,
}

/// Whether a change is only looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DryRun {
    /// Everything is checked and nothing is committed.
    All,
    /// The same, and the answer tells which proxies and resources would change.
    Preview,
}

/// How to change something.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Changing {
    /// Only look at it.
    pub dry_run: Option<DryRun>,
    /// Commit even if it touches more proxies than the mesh allows in one change.
    pub force: Option<bool>,
}

/// When and how to change something.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Expected {
    /// Only if it is at this revision.
    pub expected_revision: Option<u64>,
    /// Only look at it.
    pub dry_run: Option<DryRun>,
    /// Commit even if it touches more proxies than the mesh allows in one change.
    pub force: Option<bool>,
}

impl Changing {
    /// How the change is carried out.
    #[must_use]
    pub fn mode(&self) -> Mode {
        Mode {
            dry_run: self.dry_run == Some(DryRun::All),
            preview: self.dry_run == Some(DryRun::Preview),
            force: self.force.unwrap_or_default(),
        }
    }
}

impl Expected {
    /// How the change is carried out.
    #[must_use]
    pub fn mode(&self) -> Mode {
        Changing { dry_run: self.dry_run, force: self.force }.mode()
    }
}

/// What to watch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Watching {
    /// Changes after this revision; without it, first all that there is.
    pub revision: Option<u64>,
    /// Of this namespace only.
    pub namespace: Option<String>,
    /// With such labels.
    pub label_selector: Option<String>,
    /// With such fields.
    pub field_selector: Option<String>,
}

/// How long to wait.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Patience {
    /// Milliseconds, 30000 unless said, at most 300000.
    #[schemars(range(min = 0, max = 300_000))]
    pub timeout_milliseconds: Option<u64>,
}

/// What of a proxy's configuration to show.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ProxyTypes {
    /// `listener`, `route`, `cluster`, `endpoint`, or `all`, which is meant when nothing is said.
    pub r#type: Option<String>,
}

/// Which events to show.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Since {
    /// Those after this sequence number.
    pub after: Option<u64>,
    /// The most of them, 1000 unless said.
    #[schemars(range(min = 1, max = 10_000))]
    pub limit: Option<u32>,
}
