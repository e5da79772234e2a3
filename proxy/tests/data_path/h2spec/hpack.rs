//! Compressed heads (RFC 7541).

use super::*;

fn head(fields: &[&[u8]]) -> Vec<u8> {
    frame(HEADERS, WHOLE, 1, &[get(), fields.concat()].concat())
}

#[tokio::test]
async fn fields_have_every_form_of_the_rfc() {
    let good = Outcome::Answer(1, 200);
    let rows = [
        (
            "6.2.1 a field that goes into the table, and is used again",
            head(&[b"\x40\x03x-a\x011", b"\xbe"]),
            good,
        ),
        ("6.2.1 with a name of the static table", head(&[b"\x7a\x03abc"]), good),
        ("6.2.2 a field that does not", head(&[b"\x00\x03x-a\x011"]), good),
        ("6.2.3 a field that never may", head(&[b"\x10\x03x-a\x011"]), good),
        (
            "5.2 in Huffman's code",
            head(&[b"\x00\x03x-a\x8c\xf1\xe3\xc2\xe5\xf2\x3a\x6b\xa0\xab\x90\xf4\xff"]),
            good,
        ),
        ("6.3 a smaller table, first", frame(HEADERS, WHOLE, 1, &[vec![0x20], get()].concat()), good),
        (
            "6.3 a table of the size that is allowed",
            frame(HEADERS, WHOLE, 1, &[vec![0x3f, 0xe1, 0x1f], get()].concat()),
            good,
        ),
    ];
    check(&rows, Some(rows.len())).await;
}

#[tokio::test]
async fn what_cannot_be_decompressed_ends_the_connection() {
    let wrong = Outcome::Connection(COARSE);
    let rows = [
        ("4.3 a field that is cut", head(&[b"\x00\x05ab"]), wrong),
        ("2.3.3 an index beyond the tables", head(&[b"\xc6"]), wrong),
        ("2.3.3 a name beyond the tables", head(&[b"\x7f\x10\x011"]), wrong),
        ("4.2 a size of the table at the end", head(&[b"\x20"]), wrong),
        (
            "5.1 a number that does not end",
            head(&[b"\xff\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01"]),
            wrong,
        ),
        ("5.1 a number beyond 32 bits", head(&[b"\x00\x7f\xff\xff\xff\xff\x7f"]), wrong),
        ("5.2 more than seven bits of padding", head(&[b"\x00\x03x-a\x83\x1f\xff\xff"]), wrong),
        ("5.2 padding of zeros", head(&[b"\x00\x03x-a\x81\x18"]), wrong),
        ("5.2 the symbol for the end", head(&[b"\x00\x03x-a\x84\xff\xff\xff\xfc"]), wrong),
        ("6.1 the index nought", head(&[b"\x80"]), wrong),
        (
            "6.3 a larger table than is allowed",
            frame(HEADERS, WHOLE, 1, &[vec![0x3f, 0xe2, 0x1f], get()].concat()),
            wrong,
        ),
    ];
    check(&rows, Some(0)).await;
}

#[tokio::test]
async fn a_field_of_the_table_is_counted_each_time_it_is_used() {
    // 3,000 times four kilobytes: one frame, and more than anybody holds
    let long = [&[0x40, 3][..], b"x-a", &[0x7f, 0x81, 0x1e], &[b'x'; 3968]].concat();
    let bomb = [get(), long, vec![0xbe; 3000]].concat();
    let cookie = [&[0x60 | 0x1f, 0x01, 0x7f, 0x81, 0x1e][..], &[b'x'; 3968]].concat();
    let crumbs = [get(), cookie, vec![0xbe; 3000]].concat();
    let (proxy, backend) = start("").await;
    for block in [bomb, crumbs] {
        let mut client = Client::open(proxy.address(), &[]).await;
        client.send(&frame(HEADERS, WHOLE, 1, &block)).await;
        loop {
            let said = client.said().await;
            assert!(!matches!(said, Said::Head(1, 200) | Said::Silent), "{said:?}");
            if matches!(said, Said::Head(..) | Said::Reset(..) | Said::GoAway(_) | Said::Closed) {
                break;
            }
        }
    }
    assert_eq!(backend.hits(), 0);
    proxy.end().await;
}
