//! What a revoked node is told, and the end of what it has open.
//!
//! [`Refusing`] stands in front of everything that agents and proxies can ask a member for: whoever presents a
//! certificate of a revoked node is refused, and what it had open ends as soon as this member has applied the revocation.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use ca::node::{NodeId, Revocation, Revocations};
use ca::tls::PeerCertificates;
use hyper::body::{Body, Frame, SizeHint};
use tokio::sync::watch;
use tonic::Status;
use tonic::codegen::http::{HeaderMap, Request, Response};
use tower::{Layer, Service};

use crate::api::rfc3339;

/// The revoked nodes as applied here, always the latest.
pub(crate) type Revoked = watch::Receiver<Arc<Revocations>>;

/// What a revoked node is told.
pub(crate) fn told(revocation: &Revocation) -> String {
    let Revocation { node, at, reason, .. } = revocation;
    let why = if reason.is_empty() { String::new() } else { format!(" ({reason})") };
    format!(
        "node {node} was revoked at {}{why}; to let this machine join again, remove the agent's data folder and give it \
         a new token",
        rfc3339(*at)
    )
}

/// Puts [`Refuses`] in front of a service.
#[derive(Debug, Clone)]
pub(crate) struct Refusing(pub(crate) Revoked);

impl<S> Layer<S> for Refusing {
    type Service = Refuses<S>;

    fn layer(&self, inner: S) -> Refuses<S> {
        Refuses { inner, revoked: self.0.clone() }
    }
}

/// A service that does not serve revoked nodes.
#[derive(Debug, Clone)]
pub(crate) struct Refuses<S> {
    inner: S,
    revoked: Revoked,
}

type Answer = Response<tonic::body::Body>;

impl<S, B> Service<Request<B>> for Refuses<S>
where
    S: Service<Request<B>, Response = Answer, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Answer;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Answer, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let node = request.extensions().get::<PeerCertificates>().and_then(PeerCertificates::node);
        let Some(node) = node else { return Box::pin(self.inner.call(request)) };
        if let Some(revocation) = self.revoked.borrow().get(&node) {
            let refusal = Status::permission_denied(told(revocation));
            return Box::pin(async move { Ok(refusal.into_http()) });
        }
        let revoked = self.revoked.clone();
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            Ok(answer.map(|inner| tonic::body::Body::new(UntilRevoked::new(inner, node, revoked))))
        })
    }
}

/// The body of an answer, which ends with a refusal when its reader's node is revoked.
struct UntilRevoked {
    inner: tonic::body::Body,
    /// Nothing when the body has ended.
    refusal: Option<Pin<Box<dyn Future<Output = Status> + Send>>>,
}

impl UntilRevoked {
    fn new(inner: tonic::body::Body, node: NodeId, mut revoked: Revoked) -> Self {
        let refusal = async move {
            let told = revoked.wait_for(|revoked| revoked.contains_key(&node)).await;
            let told = told.ok().and_then(|revoked| revoked.get(&node).map(told_and_noted));
            match told {
                Some(told) => Status::permission_denied(told),
                // This member ends, and the body with it.
                None => std::future::pending().await,
            }
        };
        Self { inner, refusal: Some(Box::pin(refusal)) }
    }
}

fn told_and_noted(revocation: &Revocation) -> String {
    tracing::info!(node = %revocation.node, reason = revocation.reason, "cut off a revoked node");
    told(revocation)
}

impl Body for UntilRevoked {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let Some(refusal) = &mut this.refusal else { return Poll::Ready(None) };
        if let Poll::Ready(refusal) = refusal.as_mut().poll(cx) {
            this.refusal = None;
            let mut trailers = HeaderMap::new();
            let told = refusal.add_header(&mut trailers).map(|()| Frame::trailers(trailers));
            return Poll::Ready(Some(told));
        }
        let frame = ready!(Pin::new(&mut this.inner).poll_frame(cx));
        if frame.as_ref().is_none_or(Result::is_err) {
            this.refusal = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.refusal.is_none() || self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use ca::authn::Caller;
    use ca::authority::{Lifetimes, Serial, SigningRoot};
    use ca::identity::{SpiffeId, TrustDomain};
    use ca::svid::PrivateKey;
    use http_body_util::{BodyExt as _, Full, StreamBody};
    use tower::ServiceExt as _;

    use super::*;

    fn node() -> NodeId {
        "3a7816bf8f01cfea".parse().unwrap()
    }

    fn revocations() -> Arc<Revocations> {
        let revocation = Revocation {
            node: node(),
            namespace: "shop".to_owned(),
            service_account: "pay".to_owned(),
            at: 1_800_000_000,
            by: "ann".to_owned(),
            reason: "stolen".to_owned(),
            until: u64::MAX,
        };
        Arc::new([(node(), revocation)].into())
    }

    /// A request over a connection of a certificate whose node is the given one.
    fn request(node: NodeId) -> Request<()> {
        let (domain, now) = (TrustDomain::default(), UNIX_EPOCH + Duration::from_secs(1_800_000_000));
        let root = SigningRoot::generate(&domain, now, Serial::random().unwrap()).unwrap();
        let authority =
            root.member(&domain, "1", Lifetimes::default(), now, Serial::random().unwrap()).unwrap();
        let caller = Caller::from_redeemed_token(SpiffeId::workload(&domain, "shop", "pay").unwrap(), "t");
        let csr = PrivateKey::generate().unwrap().request().unwrap();
        let serial = Serial::of_node(node).unwrap();
        let leaf = authority.sign(csr.der(), &caller, None, now, serial).unwrap().leaf;
        let mut request = Request::new(());
        request.extensions_mut().insert(PeerCertificates::new(&[leaf]));
        request
    }

    /// A service whose answer goes on until its sender is dropped.
    fn endless(
        revoked: Revoked,
    ) -> (
        impl Service<Request<()>, Response = Answer, Error = Infallible, Future: Send> + Clone,
        tokio::sync::mpsc::Sender<Bytes>,
    ) {
        let (sender, receiver) = tokio::sync::mpsc::channel::<Bytes>(1);
        let frames =
            futures::StreamExt::map(tokio_stream::wrappers::ReceiverStream::new(receiver), |bytes| {
                Ok::<_, Status>(Frame::data(bytes))
            });
        let body = Arc::new(std::sync::Mutex::new(Some(tonic::body::Body::new(StreamBody::new(frames)))));
        let inner = tower::service_fn(move |_: Request<()>| {
            let body = body.lock().unwrap().take();
            let body = body.unwrap_or_else(|| tonic::body::Body::new(Full::new(Bytes::new())));
            async move { Ok(Response::new(body)) }
        });
        (Refusing(revoked).layer(inner), sender)
    }

    #[tokio::test]
    async fn what_is_open_ends_with_the_reason_and_nothing_is_opened_after_it() {
        let (revoke, revoked) = watch::channel(Arc::default());
        let (service, sender) = endless(revoked);
        let answer = service.clone().oneshot(request(node())).await.unwrap();
        let mut body = answer.into_body();
        sender.send(Bytes::from_static(b"served")).await.unwrap();
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "served");
        revoke.send_replace(revocations());
        let trailers = body.frame().await.unwrap().unwrap().into_trailers().unwrap();
        let status = Status::from_header_map(&trailers).unwrap();
        assert_eq!(status.code(), tonic::Code::PermissionDenied);
        let told = "node 3a7816bf8f01cfea was revoked at 2027-01-15T08:00:00Z (stolen); to let this machine join again";
        assert!(status.message().starts_with(told), "{status}");
        assert!(body.is_end_stream() && body.frame().await.is_none());

        let again = service.clone().oneshot(request(node())).await.unwrap();
        let status = Status::from_header_map(again.headers()).unwrap();
        assert!(status.message().starts_with(told), "{status}");
        let other = service.clone().oneshot(request("0000000000000001".parse().unwrap())).await.unwrap();
        assert!(Status::from_header_map(other.headers()).is_none());
        let nobody = service.oneshot(Request::new(())).await.unwrap();
        assert!(Status::from_header_map(nobody.headers()).is_none());
    }

    #[tokio::test]
    async fn an_answer_that_ends_by_itself_is_left_alone() {
        let (_revoke, revoked) = watch::channel(Arc::default());
        let (service, sender) = endless(revoked);
        let answer = service.oneshot(request(node())).await.unwrap();
        drop(sender);
        assert!(answer.into_body().collect().await.unwrap().to_bytes().is_empty());
    }
}
