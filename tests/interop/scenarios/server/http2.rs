//! What servers do over HTTP/2, and bodies of its streams.

use std::sync::Arc;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use super::{Asked, Deed, Kind, PAUSE, Place};
use crate::scenarios::wire::{Body, Fields, field};

impl Place {
    pub(super) async fn http2(self: Arc<Self>, stream: TcpStream, connection: usize) {
        let handshake = h2::server::Builder::new().enable_connect_protocol().handshake(stream).await;
        let Ok(mut io) = handshake else { return };
        let (close, gone) = (CancellationToken::new(), CancellationToken::new());
        loop {
            let next = tokio::select! {
                next = io.accept() => next,
                () = close.cancelled(), if !close.is_cancelled() => None,
                () = gone.cancelled() => return,
            };
            match next {
                Some(Ok((request, respond))) => {
                    let (place, close, gone) = (self.clone(), close.clone(), gone.clone());
                    let stop = self.stop.clone();
                    let each =
                        async move { place.stream2(request, respond, connection, &close, &gone).await };
                    self.tasks.spawn(async move { stop.run_until_cancelled(each).await });
                }
                Some(Err(_)) => return,
                None if close.is_cancelled() => break,
                None => return,
            }
        }
        io.graceful_shutdown();
        // streams that came before the client knew
        while let Some(Ok((request, respond))) = io.accept().await {
            let (place, stop) = (self.clone(), self.stop.clone());
            let none = CancellationToken::new();
            let each = async move { place.stream2(request, respond, connection, &none, &none).await };
            self.tasks.spawn(async move { stop.run_until_cancelled(each).await });
        }
    }

    async fn stream2(
        &self,
        request: Request<RecvStream>,
        mut respond: SendResponse<Bytes>,
        connection: usize,
        close: &CancellationToken,
        gone: &CancellationToken,
    ) {
        let (parts, mut upload) = request.into_parts();
        let headers = parts
            .headers
            .iter()
            .map(|(n, v)| (n.as_str().to_owned(), String::from_utf8_lossy(v.as_bytes()).into_owned()));
        let mut headers: Fields = headers.collect();
        let protocol = parts.extensions.get::<h2::ext::Protocol>();
        headers.extend(protocol.map(|p| (":protocol".to_owned(), p.as_str().to_owned())));
        let asked = Asked {
            method: parts.method.to_string(),
            path: parts.uri.path_and_query().map(ToString::to_string).unwrap_or_default(),
            version: "HTTP/2",
            authority: parts.uri.authority().map(ToString::to_string).unwrap_or_default(),
            headers,
            connection,
        };
        let plan = field(&asked.headers, "x-do").unwrap_or_default();
        let reads = parts.method != Method::CONNECT && !plan.contains("early");
        let mut body = Body { whole: true, ..Body::default() };
        if reads {
            body = download(&mut upload).await;
        }
        let deed = self.note(&asked, &body);
        // paced: a server that is slow because it was asked to be
        tokio::time::sleep(deed.wait).await;
        match deed.kind {
            Kind::Reset => respond.send_reset(Reason::INTERNAL_ERROR),
            Kind::Refuse => respond.send_reset(Reason::REFUSED_STREAM),
            Kind::Gone => gone.cancel(),
            Kind::Hang => std::future::pending().await,
            // the client is told why
            _ => drop(self.answer2(&mut respond, &asked, &deed, upload).await),
        }
        if deed.close {
            close.cancel();
        }
    }

    async fn answer2(
        &self,
        respond: &mut SendResponse<Bytes>,
        asked: &Asked,
        deed: &Deed,
        mut upload: RecvStream,
    ) -> Result<(), h2::Error> {
        if deed.hint {
            let hint = Response::builder().status(103).header("link", "</style.css>");
            respond.send_informational(hint.body(()).expect("a head"))?;
        }
        let (headers, trailers) = deed.fields();
        let mut body = deed.body(&self.name);
        let mut response = Response::new(());
        *response.status_mut() = deed.status.try_into().expect("a status");
        *response.headers_mut() = map(&headers);
        if deed.kind == Kind::Leave {
            let mut back = respond.send_response(response, false)?;
            while let Some(data) = upload.data().await {
                send(&mut back, data?, false).await?;
            }
            return send(&mut back, Bytes::new(), true).await;
        }
        if trailers.is_none() && !matches!(deed.status, 204 | 304) && !matches!(deed.kind, Kind::Grpc(_)) {
            response.headers_mut().insert("content-length", HeaderValue::from(body.len()));
        }
        if asked.method == "HEAD" {
            body.clear();
        }
        if body.is_empty() && trailers.is_none() {
            respond.send_response(response, true)?;
            return Ok(());
        }
        let mut stream = respond.send_response(response, false)?;
        match deed.kind {
            Kind::Cut | Kind::Stall => {
                body.truncate(body.len() / 2);
                send(&mut stream, body.into(), false).await?;
                if deed.kind == Kind::Stall {
                    std::future::pending::<()>().await;
                }
                // paced: what was sent is on its way before the reset comes
                tokio::time::sleep(PAUSE).await;
                stream.send_reset(Reason::INTERNAL_ERROR);
                Ok(())
            }
            _ => {
                send(&mut stream, body.into(), trailers.is_none()).await?;
                trailers.map_or(Ok(()), |trailers| stream.send_trailers(map(&trailers)))
            }
        }
    }
}

/// The fields as a map.
pub(crate) fn map(fields: &Fields) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in fields {
        let name: HeaderName = name.parse().expect("a name");
        map.append(name, value.parse().expect("a value"));
    }
    map
}

/// Sends as windows allow.
pub(crate) async fn send(
    stream: &mut SendStream<Bytes>,
    mut data: Bytes,
    end: bool,
) -> Result<(), h2::Error> {
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        match std::future::poll_fn(|cx| stream.poll_capacity(cx)).await {
            Some(Ok(room)) => {
                let part = data.split_to(room.min(data.len()));
                stream.send_data(part, end && data.is_empty())?;
            }
            Some(Err(error)) => return Err(error),
            None => return Ok(()),
        }
        if data.is_empty() {
            return Ok(());
        }
    }
    stream.send_data(data, end)
}

/// All of a stream's body and trailers.
pub(crate) async fn download(stream: &mut RecvStream) -> Body {
    let mut body = Body { whole: true, ..Body::default() };
    while let Some(data) = stream.data().await {
        let Ok(data) = data else {
            body.whole = false;
            return body;
        };
        stream.flow_control().release_capacity(data.len()).unwrap_or_default();
        body.bytes.extend_from_slice(&data);
    }
    match stream.trailers().await {
        Ok(Some(trailers)) => {
            let text = |v: &HeaderValue| String::from_utf8_lossy(v.as_bytes()).into_owned();
            body.trailers = trailers.iter().map(|(n, v)| (n.as_str().to_owned(), text(v))).collect();
        }
        Ok(None) => {}
        Err(_) => body.whole = false,
    }
    body
}
