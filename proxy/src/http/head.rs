//! The head of a request as policies and routes look at it: one normalised view for all of them.

use http::{HeaderMap, Method};

use crate::xds::matcher::{HeaderKey, HeaderMatcher};

/// A request's head, after its path was normalised.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// Method.
    pub method: &'a Method,
    /// Path with query, normalised.
    pub path_and_query: &'a str,
    /// Host, with the port if the client sent one.
    pub authority: &'a str,
    /// `http` or `https`.
    pub scheme: &'a str,
    /// All other headers.
    pub headers: &'a HeaderMap,
}

impl<'a> Head<'a> {
    /// The path without its query.
    #[must_use]
    pub fn path(&self) -> &'a str {
        self.path_and_query.split_once('?').map_or(self.path_and_query, |(path, _)| path)
    }

    /// The query without its `?`, when there is one.
    #[must_use]
    pub fn query(&self) -> Option<&'a str> {
        self.path_and_query.split_once('?').map(|(_, query)| query)
    }

    /// The first value of a header.
    #[must_use]
    pub fn value(&self, key: &HeaderKey) -> Option<&'a [u8]> {
        match key {
            HeaderKey::Name(name) => self.headers.get(name).map(http::HeaderValue::as_bytes),
            HeaderKey::Method | HeaderKey::Path | HeaderKey::Authority | HeaderKey::Scheme => {
                self.pseudo(key)
            }
        }
    }

    fn pseudo(&self, key: &HeaderKey) -> Option<&'a [u8]> {
        match key {
            HeaderKey::Method => Some(self.method.as_str().as_bytes()),
            HeaderKey::Path => Some(self.path_and_query.as_bytes()),
            HeaderKey::Authority => Some(self.authority.as_bytes()),
            HeaderKey::Scheme => Some(self.scheme.as_bytes()),
            HeaderKey::Name(_) => None,
        }
    }

    /// Whether one of the header's values fulfils a condition, or, for an inverted one, every value does; for routing.
    #[must_use]
    pub fn fulfils(&self, matcher: &HeaderMatcher) -> bool {
        self.values_fulfil(matcher, matcher.invert)
    }

    /// Whether one value (`every` = false) or every value fulfils a condition; for policies, where a second value
    /// must neither hide nor excuse the first.
    #[must_use]
    pub fn values_fulfil(&self, matcher: &HeaderMatcher, every: bool) -> bool {
        let HeaderKey::Name(name) = &matcher.key else { return matcher.matches(self.pseudo(&matcher.key)) };
        let mut values = self.headers.get_all(name).iter().peekable();
        if values.peek().is_none() {
            return matcher.matches(None);
        }
        if every {
            values.all(|v| matcher.matches(Some(v.as_bytes())))
        } else {
            values.any(|v| matcher.matches(Some(v.as_bytes())))
        }
    }
}
