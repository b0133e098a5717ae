//! The pieces of the page. Every text that is not the program's own goes through [`escape`].

/// A text that stands for itself in HTML, between tags and in quoted attributes.
pub(in crate::host) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            character => escaped.push(character),
        }
    }
    escaped
}

/// A column of a table.
pub(in crate::host) enum Column {
    /// A word or a sentence.
    Text(&'static str),
    /// A figure, which stands at the right.
    Figure(&'static str),
}

/// A table of texts that are not yet escaped; nothing where it has no rows.
pub(in crate::host) fn table(class: &str, columns: &[Column], rows: &[Vec<String>]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let class_of = |index: usize| match columns.get(index) {
        Some(Column::Figure(_)) => " class=\"n\"",
        _ => "",
    };
    let mut html = format!("<div class=\"scroll\"><table class=\"{class}\">");
    if !columns.is_empty() {
        html.push_str("<thead><tr>");
        for (index, column) in columns.iter().enumerate() {
            let (Column::Text(name) | Column::Figure(name)) = column;
            html.push_str(&format!("<th{}>{}</th>", class_of(index), escape(name)));
        }
        html.push_str("</tr></thead>");
    }
    html.push_str("<tbody>");
    for row in rows {
        html.push_str("<tr>");
        for (index, cell) in row.iter().enumerate() {
            html.push_str(&format!("<td{}>{}</td>", class_of(index), escape(cell)));
        }
        html.push_str("</tr>\n");
    }
    html.push_str("</tbody></table></div>");
    html
}

/// A part of the page under a heading; nothing where it is empty. What it says below the heading is the program's own.
pub(in crate::host) fn card(heading: &str, says: &str, content: &str) -> String {
    if content.is_empty() {
        return String::new();
    }
    let says = if says.is_empty() { String::new() } else { format!("<p class=\"sub\">{}</p>", escape(says)) };
    format!("<section class=\"card\"><h2>{}</h2>{says}{content}</section>\n", escape(heading))
}

/// What the colours of a plot stand for, in their order.
pub(in crate::host) fn legend(entries: &[(usize, String)]) -> String {
    let entry = |(colour, name): &(usize, String)| {
        format!("<li><i style=\"background:var(--s{colour})\"></i>{}</li>", escape(name))
    };
    format!("<ul class=\"legend\">{}</ul>", entries.iter().map(entry).collect::<String>())
}

/// A plot with what its colours stand for.
pub(in crate::host) fn figure(svg: &str, says: &str, entries: &[(usize, String)]) -> String {
    let svg = svg.replacen("<svg ", &format!("<svg role=\"img\" aria-label=\"{}\" ", escape(says)), 1);
    format!("{}<figure class=\"scroll\">{svg}</figure>", legend(entries))
}
