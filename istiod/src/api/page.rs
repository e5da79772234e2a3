//! Lists in pages: where one goes on, and the snapshots in which it does (pure).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::prelude::{BASE64_URL_SAFE_NO_PAD, Engine as _};
use registry::snapshot::Snapshot;
use serde::{Deserialize, Serialize};

use super::ApiError;
use super::types::{ListMeta, Page};

/// The most items of one page.
pub const LARGEST: u32 = 10_000;

/// How long a list may pause between two pages.
const KEPT_FOR: Duration = Duration::from_secs(300);

/// Snapshots that are kept for lists in pages. They share what did not change, so each costs what changed since.
const MOST_KEPT: usize = 16;

/// Where a list goes on: after this key, in this revision. Callers see it as an opaque text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct After {
    /// The revision that the list shows.
    #[serde(rename = "r")]
    pub revision: u64,
    /// The last key of the page before.
    #[serde(rename = "k")]
    pub key: String,
}

impl After {
    /// Reads the text that an earlier page gave.
    ///
    /// # Errors
    ///
    /// [`ApiError::Invalid`] for anything else.
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).ok();
        let read = bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        read.ok_or_else(|| ApiError::invalid_field("continue", "is not what an earlier page gave"))
    }

    /// The text that a caller goes on with.
    #[must_use]
    pub fn to_text(&self) -> String {
        // A number and a string: a value that always has a JSON form.
        BASE64_URL_SAFE_NO_PAD.encode(serde_json::to_vec(self).unwrap_or_default())
    }
}

/// What a caller wants of a list.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The most items; all when none is said.
    pub limit: Option<u32>,
    /// Where to go on.
    pub after: Option<After>,
}

impl Wanted {
    /// Reads `limit` and `continue`.
    ///
    /// # Errors
    ///
    /// [`ApiError::Invalid`] names the parameter.
    pub fn parse(limit: Option<u32>, after: Option<&str>) -> Result<Self, ApiError> {
        if limit.is_some_and(|limit| limit == 0 || limit > LARGEST) {
            return Err(ApiError::invalid_field("limit", format!("from 1 to {LARGEST}")));
        }
        let after = after.filter(|text| !text.is_empty()).map(After::parse).transpose()?;
        Ok(Self { limit, after })
    }

    /// One page of `items`, which come in the order of their keys, and whether there is more.
    pub fn page<I, T>(
        &self,
        revision: u64,
        items: impl Iterator<Item = I>,
        key: impl Fn(&I) -> String,
        show: impl Fn(I) -> T,
    ) -> Page<T> {
        let limit = self.limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
        let mut rest = items
            .skip_while(|item| self.after.as_ref().is_some_and(|after| key(item) <= after.key))
            .peekable();
        let (mut page, mut last) = (Vec::new(), String::new());
        while page.len() < limit
            && let Some(item) = rest.next()
        {
            if page.len() + 1 == limit {
                last = key(&item);
            }
            page.push(show(item));
        }
        let more = rest.peek().is_some().then(|| After { revision, key: last }.to_text());
        let (resource_version, r#continue) = (revision.to_string(), more.unwrap_or_default());
        let metadata = ListMeta { resource_version, r#continue, partial: false };
        Page { items: page, metadata }
    }
}

/// A key of several parts that sorts as the parts do.
#[must_use]
pub fn key_of(parts: &[&str]) -> String {
    parts.join("\0")
}

/// Snapshots that lists in pages go on in.
#[derive(Debug, Default)]
pub struct Kept {
    by: BTreeMap<u64, (Arc<Snapshot>, Instant)>,
}

impl Kept {
    /// Keeps a snapshot from now on; the one that was used the longest time ago makes room.
    pub fn put(&mut self, snapshot: &Arc<Snapshot>, now: Instant) {
        self.forget(now);
        self.by.insert(snapshot.revision().0, (snapshot.clone(), now));
        if self.by.len() > MOST_KEPT {
            let oldest = self.by.iter().min_by_key(|(_, (_, used))| *used).map(|(revision, _)| *revision);
            oldest.and_then(|oldest| self.by.remove(&oldest));
        }
    }

    /// A snapshot that is still kept.
    pub fn get(&mut self, revision: u64, now: Instant) -> Option<Arc<Snapshot>> {
        self.forget(now);
        let (snapshot, used) = self.by.get_mut(&revision)?;
        *used = now;
        Some(snapshot.clone())
    }

    fn forget(&mut self, now: Instant) {
        self.by.retain(|_, (_, used)| now.saturating_duration_since(*used) < KEPT_FOR);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(limit: u32, of: &[&str]) -> Vec<Vec<String>> {
        let (mut all, mut next) = (Vec::new(), String::new());
        loop {
            let wanted = Wanted::parse(Some(limit), Some(&next)).unwrap();
            let page = wanted.page(7, of.iter(), |s| (**s).to_owned(), |s| (*s).to_owned());
            all.push(page.items);
            next = page.metadata.r#continue;
            if next.is_empty() {
                return all;
            }
        }
    }

    #[test]
    fn pages_are_the_list_in_pieces() {
        assert_eq!(pages(2, &["a", "b", "c", "d", "e"]), [vec!["a", "b"], vec!["c", "d"], vec!["e"]]);
        assert_eq!(pages(2, &["a", "b"]), [vec!["a", "b"]]);
        assert_eq!(pages(2, &[]), [Vec::<String>::new()]);
    }

    #[test]
    fn what_no_page_gave_is_refused() {
        for text in ["x", "e30", "eyJyIjoxfQ", "%%"] {
            assert!(Wanted::parse(None, Some(text)).is_err(), "{text}");
        }
        assert!(Wanted::parse(Some(0), None).is_err() && Wanted::parse(Some(LARGEST + 1), None).is_err());
        let after = After { revision: 3, key: key_of(&["a", "b"]) };
        assert_eq!(After::parse(&after.to_text()).unwrap(), after);
    }

    #[test]
    fn snapshots_are_kept_for_a_while_and_only_some() {
        let (mut kept, start) = (Kept::default(), tokio::time::Instant::now().into_std());
        let snapshot = Arc::new(Snapshot::default());
        kept.put(&snapshot, start);
        assert!(kept.get(0, start + KEPT_FOR / 2).is_some());
        assert!(kept.get(0, start + KEPT_FOR).is_some(), "use keeps it");
        assert!(kept.get(0, start + KEPT_FOR * 3).is_none());
    }
}
