//! Tokens (RFC 7519): where a request carries them, whether they are good, and what they say. Pure.
//!
//! A token is believed when one of its issuer's keys made its signature. The key decides how that is checked; the
//! token's own word on it only chooses among what the key can do, and `none` is nothing a key can do. All tokens that
//! a request carries must be good: the server might look at another one than we did.

mod keys;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use http::HeaderName;
use serde_json::{Map, Value as Json};

use crate::http::head::Head;
use crate::xds::jwt::{JwksSource, JwtAuthn, JwtProvider, JwtRequirement};
pub use keys::KeySet;

/// The name under which filters leave and find claims in a request's metadata.
pub const NAMESPACE: &str = "envoy.filters.http.jwt_authn";

/// Why a request is turned away, in Envoy's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// No token where one is needed.
    #[error("Jwt is missing")]
    Missing,
    /// Not three parts.
    #[error("Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections")]
    Form,
    /// The header is not base64url.
    #[error("Jwt header is an invalid Base64url encoded")]
    HeaderEncoding,
    /// The header is not JSON that is understood.
    #[error("Jwt header is an invalid JSON")]
    Header,
    /// A signature of a kind that is not known.
    #[error("Jwt header [alg] is not supported")]
    Algorithm,
    /// The payload is not base64url.
    #[error("Jwt payload is an invalid Base64url encoded")]
    PayloadEncoding,
    /// The payload is not JSON with claims of the right kinds.
    #[error("Jwt payload is an invalid JSON")]
    Payload,
    /// The signature is not base64url.
    #[error("Jwt signature is an invalid Base64url encoded")]
    Signature,
    /// Nobody that is believed made it.
    #[error("Jwt issuer is not configured")]
    Issuer,
    /// It is about somebody else.
    #[error("Jwt subject is not allowed")]
    Subject,
    /// Its time has not come.
    #[error("Jwt not yet valid")]
    NotYet,
    /// Its time is over.
    #[error("Jwt is expired")]
    Expired,
    /// It is for somebody else.
    #[error("Audiences in Jwt are not allowed")]
    Audience,
    /// The issuer's keys are not known.
    #[error("Jwks remote fetch is failed")]
    NoKeys,
    /// None of the issuer's keys is named by it.
    #[error("Jwks doesn't have key to match kid or alg from Jwt")]
    NoKey,
    /// The signature is not the issuer's.
    #[error("Jwt verification fails")]
    Forged,
}

/// Where a token was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In this header.
    Header(HeaderName),
    /// In this query parameter.
    Parameter(Box<str>),
    /// In a cookie.
    Cookie,
}

/// A good token.
#[derive(Clone, Debug)]
pub struct Verified<'a> {
    /// Whose it is.
    pub provider: &'a JwtProvider,
    /// Where it was.
    pub place: Place,
    /// Its claims.
    pub claims: Map<String, Json>,
    /// Its claims as it carries them.
    pub payload: String,
}

/// The good tokens of a request that fulfils the requirement; `now` is in seconds of Unix time.
///
/// # Errors
///
/// Why it does not.
pub fn check<'a>(
    authn: &'a JwtAuthn,
    requirement: &JwtRequirement,
    head: &Head<'_>,
    now: u64,
) -> Result<Vec<Verified<'a>>, Problem> {
    let asked = Asked { authn, head, now };
    let all: Vec<&JwtProvider> = authn.providers.values().collect();
    asked.fulfil(requirement, &all)
}

/// A token as it was found, and the issuers that may be found there.
struct Found<'a> {
    text: String,
    place: Place,
    issuers: Vec<Option<&'a str>>,
}

struct Asked<'a, 'h> {
    authn: &'a JwtAuthn,
    head: &'h Head<'h>,
    now: u64,
}

impl<'a> Asked<'a, '_> {
    /// `around`: the issuers of the requirement this one is part of.
    fn fulfil(
        &self,
        requirement: &JwtRequirement,
        around: &[&'a JwtProvider],
    ) -> Result<Vec<Verified<'a>>, Problem> {
        match requirement {
            JwtRequirement::Provider(name, audiences) => {
                let provider = self.authn.providers.get(name).ok_or(Problem::Issuer)?;
                let found = self.find(&[provider]);
                if found.is_empty() {
                    return Err(Problem::Missing);
                }
                found.into_iter().map(|f| self.verify(f, Some((provider, audiences)))).collect()
            }
            JwtRequirement::All(all) => {
                let mut good = Vec::new();
                for one in all {
                    good.extend(self.fulfil(one, around)?);
                }
                Ok(good)
            }
            JwtRequirement::Any(any) => self.any(any),
            JwtRequirement::AllowMissing => {
                self.find(around).into_iter().map(|f| self.verify(f, None)).collect()
            }
            JwtRequirement::AllowMissingOrFailed => {
                Ok(self.find(around).into_iter().filter_map(|f| self.verify(f, None).ok()).collect())
            }
        }
    }

    /// The first that is fulfilled; what allows a missing token comes last, wherever it stands.
    fn any(&self, any: &[JwtRequirement]) -> Result<Vec<Verified<'a>>, Problem> {
        let allows = |r: &&JwtRequirement| {
            matches!(r, JwtRequirement::AllowMissing | JwtRequirement::AllowMissingOrFailed)
        };
        let mut around = Vec::new();
        any.iter().for_each(|r| self.named(r, &mut around));
        let mut worst = Problem::Missing;
        for one in any.iter().filter(|r| !allows(r)).chain(any.iter().filter(allows)) {
            match self.fulfil(one, &around) {
                Ok(good) => return Ok(good),
                // that it is somebody else's says less than what is wrong with it
                Err(problem) if matches!(worst, Problem::Missing | Problem::Issuer) => {
                    if problem != Problem::Missing {
                        worst = problem;
                    }
                }
                Err(_) => {}
            }
        }
        Err(worst)
    }

    fn named(&self, requirement: &JwtRequirement, into: &mut Vec<&'a JwtProvider>) {
        match requirement {
            JwtRequirement::Provider(name, _) => into.extend(self.authn.providers.get(name)),
            JwtRequirement::Any(all) | JwtRequirement::All(all) => {
                all.iter().for_each(|r| self.named(r, into));
            }
            JwtRequirement::AllowMissing | JwtRequirement::AllowMissingOrFailed => {}
        }
    }

    /// Every token that the request carries where one of these issuers' may be.
    fn find(&self, providers: &[&'a JwtProvider]) -> Vec<Found<'a>> {
        let mut all: Vec<Found<'a>> = Vec::new();
        for provider in providers {
            let issuer = provider.issuer.as_deref();
            for (text, place) in tokens(provider, self.head) {
                match all.iter_mut().find(|f| f.text == text && f.place == place) {
                    Some(found) => found.issuers.push(issuer),
                    None => all.push(Found { text, place, issuers: vec![issuer] }),
                }
            }
        }
        all
    }

    fn verify(
        &self,
        found: Found<'a>,
        wanted: Option<(&'a JwtProvider, &[Box<str>])>,
    ) -> Result<Verified<'a>, Problem> {
        let token = Token::parse(&found.text)?;
        let issuer = token.text("iss")?;
        if !found.issuers.iter().any(|allowed| allowed.is_none_or(|a| Some(a) == issuer)) {
            return Err(Problem::Issuer);
        }
        let provider = match wanted {
            Some((provider, _)) => provider,
            None => self.provider_of(issuer).ok_or(Problem::Issuer)?,
        };
        let audiences =
            wanted.map_or(&*provider.audiences, |(p, own)| if own.is_empty() { &p.audiences } else { own });
        token.allowed(provider, audiences, self.now)?;
        match &provider.keys {
            JwksSource::Local(keys) => {
                keys.verify(&token.algorithm, token.key.as_deref(), token.signed, &token.signature)?;
            }
            JwksSource::Unavailable => return Err(Problem::NoKeys),
        }
        Ok(Verified { provider, place: found.place, payload: token.payload.to_owned(), claims: token.claims })
    }

    fn provider_of(&self, issuer: Option<&str>) -> Option<&'a JwtProvider> {
        let all = || self.authn.providers.values();
        all()
            .find(|p| p.issuer.is_some() && p.issuer.as_deref() == issuer)
            .or_else(|| all().find(|p| p.issuer.is_none()))
    }
}

/// A token taken apart, not yet believed.
struct Token<'t> {
    signed: &'t [u8],
    payload: &'t str,
    algorithm: String,
    key: Option<String>,
    claims: Map<String, Json>,
    signature: Vec<u8>,
}

fn object(part: &str, encoding: Problem, json: Problem) -> Result<Map<String, Json>, Problem> {
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(part).map_err(|_| encoding)?;
    serde_json::from_slice(&bytes).map_err(|_| json)
}

impl<'t> Token<'t> {
    fn parse(text: &'t str) -> Result<Self, Problem> {
        let (signed, signature) = text.rsplit_once('.').ok_or(Problem::Form)?;
        let (header, payload) =
            signed.split_once('.').filter(|(_, p)| !p.contains('.')).ok_or(Problem::Form)?;
        let header = object(header, Problem::HeaderEncoding, Problem::Header)?;
        // what must be understood is not understood here (RFC 7515, section 4.1.11)
        if header.contains_key("crit") {
            return Err(Problem::Header);
        }
        let algorithm = header.get("alg").and_then(Json::as_str).ok_or(Problem::Header)?.to_owned();
        if !keys::is_known(&algorithm) {
            return Err(Problem::Algorithm);
        }
        let key = match header.get("kid") {
            None => None,
            Some(Json::String(id)) => Some(id.clone()),
            Some(_) => return Err(Problem::Header),
        };
        let claims = object(payload, Problem::PayloadEncoding, Problem::Payload)?;
        let signature = BASE64_URL_SAFE_NO_PAD.decode(signature).map_err(|_| Problem::Signature)?;
        Ok(Self { signed: signed.as_bytes(), payload, algorithm, key, claims, signature })
    }

    fn text(&self, claim: &str) -> Result<Option<&str>, Problem> {
        match self.claims.get(claim) {
            None => Ok(None),
            Some(Json::String(text)) => Ok(Some(text)),
            Some(_) => Err(Problem::Payload),
        }
    }

    /// Seconds of Unix time; fractions are dropped.
    fn time(&self, claim: &str) -> Result<Option<u64>, Problem> {
        let Some(value) = self.claims.get(claim) else { return Ok(None) };
        if let Some(whole) = value.as_u64() {
            return Ok(Some(whole));
        }
        let Some(number) = value.as_f64().filter(|n| (0.0..9e15).contains(n)) else {
            return Err(Problem::Payload);
        };
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "0 to 9e15, see above")]
        Ok(Some(number as u64))
    }

    fn audiences(&self) -> Result<Vec<&str>, Problem> {
        match self.claims.get("aud") {
            None => Ok(Vec::new()),
            Some(Json::String(one)) => Ok(vec![one]),
            Some(Json::Array(all)) => all.iter().map(|a| a.as_str().ok_or(Problem::Payload)).collect(),
            Some(_) => Err(Problem::Payload),
        }
    }

    fn allowed(&self, provider: &JwtProvider, wanted: &[Box<str>], now: u64) -> Result<(), Problem> {
        let subject = self.text("sub")?;
        if provider.subjects.as_ref().is_some_and(|m| !subject.is_some_and(|s| m.matches(s.as_bytes()))) {
            return Err(Problem::Subject);
        }
        let skew = provider.clock_skew.as_secs();
        if self.time("nbf")?.is_some_and(|from| now.saturating_add(skew) < from) {
            return Err(Problem::NotYet);
        }
        if self.time("exp")?.is_some_and(|until| now > until.saturating_add(skew)) {
            return Err(Problem::Expired);
        }
        let audiences = self.audiences()?;
        let bare = |a: &str| plain_audience(a).to_owned();
        if wanted.is_empty() || audiences.iter().any(|a| wanted.iter().any(|w| bare(w) == bare(a))) {
            Ok(())
        } else {
            Err(Problem::Audience)
        }
    }
}

/// Envoy compares audiences without their scheme and last slash.
fn plain_audience(text: &str) -> &str {
    let bare = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).unwrap_or(text);
    bare.strip_suffix('/').unwrap_or(bare)
}

/// Tokens where this issuer's may be, and those places. Without a word about places: a bearer token, or the query
/// parameter `access_token` (RFC 6750).
fn tokens(provider: &JwtProvider, head: &Head<'_>) -> Vec<(String, Place)> {
    let anywhere = provider.from_headers.is_empty()
        && provider.from_params.is_empty()
        && provider.from_cookies.is_empty();
    let mut out = Vec::new();
    if anywhere {
        in_header(head, &http::header::AUTHORIZATION, "Bearer ", &mut out);
        in_query(head, "access_token", &mut out);
    }
    for (name, prefix) in &provider.from_headers {
        in_header(head, name, prefix, &mut out);
    }
    for name in &provider.from_params {
        in_query(head, name, &mut out);
    }
    let cookies = head.headers.get_all(http::header::COOKIE);
    let pairs = cookies.iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(';'));
    for (name, value) in pairs.filter_map(|p| p.trim().split_once('=')) {
        if provider.from_cookies.iter().any(|c| **c == *name) {
            out.push((value.trim_matches('"').to_owned(), Place::Cookie));
        }
    }
    out
}

fn in_header(head: &Head<'_>, name: &HeaderName, prefix: &str, out: &mut Vec<(String, Place)>) {
    for value in head.headers.get_all(name) {
        let text = String::from_utf8_lossy(value.as_bytes());
        let Some((_, token)) = (if prefix.is_empty() { Some(("", &*text)) } else { text.split_once(prefix) })
        else {
            continue;
        };
        let is_token = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let token = token.trim_start_matches(|c| !is_token(c));
        let end = token.find(|c| !is_token(c)).unwrap_or(token.len());
        let token = token.get(..end).unwrap_or_default();
        if !token.is_empty() {
            out.push((token.to_owned(), Place::Header(name.clone())));
        }
    }
}

fn in_query(head: &Head<'_>, name: &str, out: &mut Vec<(String, Place)>) {
    for (key, value) in head.query().into_iter().flat_map(|q| q.split('&')).filter_map(|p| p.split_once('='))
    {
        if decoded(key) == name && !value.is_empty() {
            out.push((decoded(value).into_owned(), Place::Parameter(name.into())));
        }
    }
}

fn decoded(text: &str) -> std::borrow::Cow<'_, str> {
    percent_encoding::percent_decode_str(text).decode_utf8_lossy()
}

/// The path and query without the parameter that held a token.
#[must_use]
pub fn without_parameter(path_and_query: &str, name: &str) -> String {
    let Some((path, query)) = path_and_query.split_once('?') else { return path_and_query.to_owned() };
    let is_it = |pair: &&str| decoded(pair.split_once('=').map_or(*pair, |(key, _)| key)) == name;
    let rest: Vec<&str> = query.split('&').filter(|p| !is_it(p)).collect();
    if rest.is_empty() { path.to_owned() } else { format!("{path}?{}", rest.join("&")) }
}

impl Verified<'_> {
    /// The claims as policies see them: those that hold words parted by spaces as lists.
    #[must_use]
    pub fn listed_claims(&self) -> Map<String, Json> {
        let mut claims = self.claims.clone();
        for name in &self.provider.space_delimited_claims {
            if let Some(value @ Json::String(_)) = claims.get_mut(&**name) {
                let words = value.as_str().unwrap_or_default();
                *value = words.split(' ').filter(|w| !w.is_empty()).map(Json::from).collect();
            }
        }
        claims
    }

    /// A claim as the text of a header; dots lead into it.
    #[must_use]
    pub fn claim_text(&self, name: &str) -> Option<String> {
        let whole = self.claims.get(name);
        let value = whole.or_else(|| {
            let mut keys = name.split('.');
            keys.next()
                .and_then(|first| self.claims.get(first))
                .and_then(|v| keys.try_fold(v, |v, k| v.get(k)))
        })?;
        match value {
            Json::Null => None,
            Json::String(text) => Some(text.clone()),
            Json::Bool(_) | Json::Number(_) => Some(value.to_string()),
            Json::Array(_) | Json::Object(_) => {
                Some(base64::prelude::BASE64_STANDARD.encode(value.to_string()))
            }
        }
    }

    /// The payload as a header carries it.
    #[must_use]
    pub fn payload_text(&self, padded: bool) -> String {
        let missing = if padded { (4 - self.payload.len() % 4) % 4 } else { 0 };
        format!("{}{}", self.payload, "=".repeat(missing))
    }
}

#[cfg(test)]
mod tests;
